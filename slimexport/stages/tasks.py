"""Asks every export, the dense one and the checkpoint the questions of the config's tasks; keeps what they answered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.artifacts import (
    ExportArtifact,
    ShrunkCheckpoint,
    VerificationReport,
    read_json,
    sha256_file,
    write_json,
)
from slimexport.errors import BadInputError
from slimexport.run_directory import TASKS, RunDirectory
from slimexport.runtime import CheckpointDecoder, Decoder, open_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from slimexport.config import RunConfig
    from slimexport.progress import Progress
    from slimexport.tasks.named import Named
    from slimexport.tasks.score import Scores


def with_tasks(
    found: Mapping[str, VerificationReport],
    directory: RunDirectory,
    config: RunConfig,
    made_of: Mapping[str, ExportArtifact],
    dense: str,
    checkpoint: ShrunkCheckpoint,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
) -> dict[str, VerificationReport]:
    """The reports of all exports with the figures of the tasks. `dense` is the one that accuracy is held to, if
    it was exported.

    What was answered stays in tasks.json under the sums of the files and the questions, and is not asked again.
    """
    from slimexport.tasks import figures, named

    if not config.tasks:
        return dict(found)
    kept = _Kept(directory / TASKS)
    made = dict(found)
    for task in map(named.parse, config.tasks):

        def asked(name: str, files: Mapping[str, str], place: Path, torch: bool = False, task: Named = task) -> Scores:
            progress.note(f"{task.name}: asking {name}")
            return kept.asked(task, config, files, partial(_open, place, config, torch), tokenizer, progress)

        other = made_of.get(dense)
        baseline = asked(dense, other.files, Path(other.path)) if other else None
        torch = asked(checkpoint.path, checkpoint.files, directory / checkpoint.path, torch=True)
        for name in found:
            own = asked(name, made_of[name].files, Path(made_of[name].path))
            made[name] = replace(
                made[name],
                figures=(*made[name].figures, *figures.task_figures(own, baseline, torch)),
                tasks={
                    **made[name].tasks,
                    task.name: figures.record(own, baseline, torch) | {"asked": _asked(task, config)},
                },
            )
    return made


def _asked(task: Named, config: RunConfig) -> dict[str, Any]:
    """Which of a task's questions."""
    return {"questions": sha256_file(task.file) if task.file else None, "limit": config.task_limit}


def _open(place: Path, config: RunConfig, torch: bool) -> Decoder:
    if torch:
        return CheckpointDecoder(place, "cuda" if config.provider == "cuda" else "cpu", config.threads)
    return open_decoder(place, config.provider, config.threads, config.provider_options)


class _Kept:
    """Answers by what they were asked of."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.all: dict[str, Any] = read_json(path) if path.is_file() else {}
        except BadInputError:  # cut off while it was written: asked again
            self.all = {}

    def asked(
        self,
        task: Named,
        config: RunConfig,
        files: Mapping[str, str],
        opened: Any,
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress,
    ) -> Scores:
        from slimexport.environment import version
        from slimexport.tasks import score

        of = {
            "task": task.name,
            **_asked(task, config),
            "files": dict(files),
            "provider": config.provider,
            "lm_eval": version("lm_eval"),
        }
        key = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
        if key in self.all:
            stored = self.all[key]
            questions = {name: tuple(values) for name, values in stored["questions"].items()}
            return score.Scores(stored["task"], stored["metrics"], questions, tuple(stored["answers"]),
                                tuple(stored.get("lower_is_better", ())))  # fmt: skip
        tell = lambda done, total: progress.update(done, total, f"questions of {task.name}")  # noqa: E731
        made = score.ask(opened(), tokenizer, task, config.task_limit, tell)
        self.all[key] = asdict(made)
        write_json(self.path, self.all)
        return made
