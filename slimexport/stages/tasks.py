"""Asks every export, the dense one and the checkpoint the questions of the config's tasks; keeps what they answered.

They are asked before anything is measured: a task may fail in many ways that only asking shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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


@dataclass(frozen=True)
class Answers:
    """What was answered in one task; `asked` says which of its questions."""

    exports: Mapping[str, Scores]
    dense: Scores | None
    torch: Scores
    asked: Mapping[str, Any]


def ask_tasks(
    names: Sequence[str],
    directory: RunDirectory,
    config: RunConfig,
    made_of: Mapping[str, ExportArtifact],
    dense: str,
    checkpoint: ShrunkCheckpoint,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
) -> dict[str, Answers]:
    """By task, of all exports. `dense` is the one that accuracy is held to, if it was exported.

    What was answered stays in tasks.json under the sums of the files and the questions, and is not asked again.
    """
    from slimexport.tasks import named

    made: dict[str, Answers] = {}
    if not config.tasks:
        return made
    kept = _Kept(directory / TASKS)
    for task in map(named.parse, config.tasks):

        def asked(name: str, files: Mapping[str, str], place: Path, torch: bool = False, task: Named = task) -> Scores:
            progress.note(f"{task.name}: asking {name}")
            return kept.asked(task, config, files, partial(_open, place, config, torch), tokenizer, progress)

        other = made_of.get(dense)
        baseline = asked(dense, other.files, Path(other.path)) if other else None
        torch = asked(checkpoint.path, checkpoint.files, directory / checkpoint.path, torch=True)
        own = {name: asked(name, made_of[name].files, Path(made_of[name].path)) for name in names}
        made[task.name] = Answers(own, baseline, torch, _asked(task, config))
    return made


def with_tasks(report: VerificationReport, name: str, answers: Mapping[str, Answers]) -> VerificationReport:
    """The report of the export `name` with the figures of the tasks."""
    from slimexport.tasks import figures

    for task, of in answers.items():
        own = of.exports[name]
        report = replace(
            report,
            figures=(*report.figures, *figures.task_figures(own, of.dense, of.torch)),
            tasks={**report.tasks, task: figures.record(own, of.dense, of.torch) | {"asked": dict(of.asked)}},
        )
    return report


def questions_of(config: RunConfig) -> dict[str, Any]:
    """By task, which questions the config asks: those of a file may change."""
    from slimexport.tasks import named

    return {task.name: _asked(task, config) for task in map(named.parse, config.tasks)}


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
