"""Recipes: a YAML file whose keys are the fields of RunConfig. Relative paths in it are relative to the shell's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from slimexport.config import check_keys
from slimexport.errors import BadInputError


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; a recipe that says two things is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"{min(twice)!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML or JSON file holds; BadInputError in one line for a missing file or bad YAML (with its line number).

    `what` names the file in the error, such as "Recipe".
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise BadInputError(f"{what} {path} cannot be read: {reason}.") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        line = f", line {mark.line + 1}" if mark else ""
        raise BadInputError(f"{what} {path}{line} is not valid YAML: {problem}.") from error


def load_recipe(path: Path) -> dict[str, Any]:
    """Reads a recipe into a dict of known keys; values are checked later, together with the flags.

    Raises BadInputError, one line, for a missing file, bad YAML (with its line number), or an unknown key.
    """
    data = read_yaml(path, "Recipe")
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise BadInputError(f"Recipe {path} must be a mapping of keys to values, not a {type(data).__name__}.")
    check_keys(data, str(path))
    return data
