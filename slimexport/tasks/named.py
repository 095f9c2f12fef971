"""Which task: `arc_easy`, whose questions lm-eval fetches from the Hub, or `arc_easy=FILE`, with questions of one's own
in the same layout (JSONL, JSON or Parquet)."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from slimexport.errors import BadInputError, nearest, reason

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_NAME = re.compile(r"[\w\-.+]+")


@dataclass(frozen=True)
class Named:
    """A task and the file of its questions, if that is not lm-eval's own place."""

    name: str
    file: Path | None

    def __str__(self) -> str:
        return self.name if self.file is None else f"{self.name}={self.file}"


def parse(spec: str) -> Named:
    """Raises ValueError, one line."""
    name, _, file = spec.partition("=")
    if not _NAME.fullmatch(name.strip()) or ("=" in spec and not file.strip()):
        raise ValueError(f"{spec!r} is not a task: write NAME or NAME=FILE")
    return Named(name.strip(), Path(file.strip()).expanduser() if file else None)


@cache
def manager() -> Any:
    """lm-eval's catalogue; BadInputError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise BadInputError("Tasks need lm-eval: pip install 'slimexport[eval]'.")
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check(tasks: tuple[str, ...]) -> None:
    """That a task does not exist, or its file, is said before minutes of pruning. Raises BadInputError."""
    if not tasks:
        return
    known = manager().all_subtasks
    for task in map(parse, tasks):
        if task.name not in known:
            raise BadInputError(f"lm-eval has no task {task.name!r}.{nearest(task.name, known)}")
        if task.file is not None:
            if not task.file.is_file():
                raise BadInputError(f"The questions of task {task.name}, {task.file}, are no file.")
            if task.file.suffix.lower() not in _FORMATS:
                raise BadInputError(f"Questions are read from {', '.join(_FORMATS)} files, not from {task.file}.")


def spec(task: Named, place: Path) -> str:
    """What lm-eval is given: a name, or a YAML file in `place` that takes all but the questions from the task of that
    name. lm-eval's copy of the questions goes to `place` too, not to the user's cache."""
    if task.file is None:
        return task.name
    import yaml

    own = {
        "include": str(manager().task_index[task.name].yaml_path),
        "task": task.name,
        "dataset_path": _FORMATS[task.file.suffix.lower()],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(task.file.resolve())}, "cache_dir": str(place)},
        "test_split": "test",
        "validation_split": None,
        "training_split": None,
        "fewshot_split": None,
        "num_fewshot": 0,
    }
    written = place / f"{task.name}.yaml"
    written.write_text(yaml.safe_dump(own), encoding="utf-8")
    return str(written)


def unreadable(task: Named, error: Exception) -> BadInputError:
    """Of what lm-eval raised over the questions of a file: in all classes, and over the field that it missed."""
    where = f" with the questions of {task.file}" if task.file else ""
    return BadInputError(f"Task {task.name} cannot be asked{where}: {type(error).__name__}: {reason(error)}")
