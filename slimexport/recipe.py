"""Recipes: a YAML file whose keys are the fields of RunConfig, or the name of one of ours (`recipes/`). Relative paths
in it are relative to the shell's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from slimexport.config import check_keys
from slimexport.errors import BadInputError, nearest


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


BUILTIN = Path(__file__).with_name("recipes")


def builtin() -> dict[str, str]:
    """Name of each recipe of ours -> what it is for, from the comment at its head."""
    return {path.stem: _head(path) for path in sorted(BUILTIN.glob("*.yaml"))}


def _head(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def text_of(name: str) -> str:
    """The YAML of one of ours; BadInputError for another name, with the nearest one."""
    if name not in builtin():
        raise BadInputError(f"There is no recipe {name!r}.{nearest(name, builtin())}")
    return (BUILTIN / f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(path: Path) -> dict[str, Any]:
    """Reads a recipe into a dict of known keys; values are checked later, together with the flags. A file goes before
    one of ours of the same name.

    Raises BadInputError, one line, for a missing file, bad YAML (with its line number), or an unknown key.
    """
    if not path.is_file() and path.parent == Path() and not path.suffix:
        if path.name not in builtin():
            names = ", ".join(builtin())
            raise BadInputError(f"Recipe {path} is no file, and none of ours ({names}).{nearest(path.name, builtin())}")
        path = BUILTIN / f"{path.name}.yaml"
    data = read_yaml(path, "Recipe")
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise BadInputError(f"Recipe {path} must be a mapping of keys to values, not a {type(data).__name__}.")
    check_keys(data, str(path))
    return data
