"""The run directory (DESIGN.md): where every stage's result lies, what state it is in, and who may write.

run.json            resolved config, environment, source, stage states
plan.json           PruningPlan
prune.json          trace per block, calibration text
checkpoint/         the shrunk Hugging Face directory
onnx/               the exported graph (one directory per target)
baseline/onnx/      the dense model, same export
numerics.json       logits of the graphs against torch
verification.json   VerificationReport
report/             report.json, report.md, report.html, junit.xml
.work/              blocks of an unfinished prune stage
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimexport.artifacts import (
    SCHEMA_VERSION,
    BlockTrace,
    ShrunkCheckpoint,
    TextSource,
    VerificationReport,
    from_dict,
    read_json,
    to_dict,
    write_json,
)
from slimexport.config import RunConfig, make_config
from slimexport.errors import BadInputError

RUN, PLAN, PRUNE, NUMERICS, VERIFICATION = "run.json", "plan.json", "prune.json", "numerics.json", "verification.json"
CHECKPOINT, BASELINE, REPORT, WORK, LOCK = "checkpoint", "baseline", "report", ".work", ".lock"


@dataclass(frozen=True)
class PruneRecord:
    """prune.json: what was kept in every block, at what error and cost, and the checkpoint it became."""

    trace: tuple[BlockTrace, ...]
    calibration: TextSource
    checkpoint: ShrunkCheckpoint


@dataclass(frozen=True)
class VerifyRecord:
    """verification.json: everything measured, and on which text."""

    report: VerificationReport
    evaluation: TextSource


class RunDirectory:
    """Paths and stage states of one run. A stage is done when run.json says so, which is written last."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.state: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "stages": {}}
        if (self.path / RUN).is_file():
            self.state = read_json(self.path / RUN)
            if self.state.get("schema_version") != SCHEMA_VERSION:
                raise BadInputError(
                    f"{self.path / RUN} has schema_version {self.state.get('schema_version')}, "
                    f"this slimexport reads {SCHEMA_VERSION}."
                )

    @classmethod
    def existing(cls, path: Path) -> RunDirectory:
        """Raises BadInputError where `path` holds no run."""
        if not (Path(path) / RUN).is_file():
            raise BadInputError(f"{path} is no run directory (no {RUN}); `slimexport prune MODEL -o {path}` makes one.")
        return cls(path)

    @property
    def config(self) -> RunConfig:
        return make_config(self.state["config"], str(self.path / RUN))

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    # ------------------------------------------------------------------------------------------------------ stages

    def done(self, stage: str, key: dict[str, Any] | None = None) -> bool:
        """Whether `stage` is finished and (where `key` is given) was made from exactly that."""
        record = self.state["stages"].get(stage)
        return record is not None and (key is None or record["key"] == _plain(key))

    def key(self, stage: str) -> dict[str, Any]:
        record = self.state["stages"].get(stage)
        return record["key"] if record else {}

    def finish(self, stage: str, key: dict[str, Any], seconds: float) -> None:
        """Marks `stage` as done; what was made from an earlier result of it no longer counts."""
        names = list(self.state["stages"])
        if stage in names:
            for later in names[names.index(stage) :]:
                del self.state["stages"][later]
        self.state["stages"][stage] = {"key": _plain(key), "seconds": round(seconds, 3)}
        self.save()

    def save(self, **fields: Any) -> None:
        self.state.update(fields)
        write_json(self / RUN, self.state)

    def seconds(self) -> dict[str, float]:
        return {name: record["seconds"] for name, record in self.state["stages"].items()}

    def read(self, name: str, kind: Any) -> Any:
        """A value object from its JSON file; BadInputError where it is missing or broken."""
        return from_dict(kind, read_json(self / name), str(self / name))

    def write(self, name: str, value: Any) -> None:
        write_json(self / name, to_dict(value))

    # ----------------------------------------------------------------------------------------------- opening, lock

    def check_free(self, *, force: bool, resume: bool) -> None:
        """Raises BadInputError unless the directory is empty, or holds a run and may be replaced or gone on with."""
        if self.path.exists() and not self.path.is_dir():
            raise BadInputError(f"{self.path} is a file; the output must be a directory.")
        content = [p.name for p in self.path.iterdir() if p.name != LOCK] if self.path.is_dir() else []
        if not content:
            return
        if RUN not in content:
            raise BadInputError(f"{self.path} is not empty and holds no run of slimexport; it is left alone.")
        if not force and not resume:
            raise BadInputError(f"{self.path} holds a run already: --force replaces it, --resume goes on with it.")

    def clear(self) -> None:
        """Removes what slimexport wrote, but for the baseline, which is reused where its hash still fits."""
        for path in self.path.iterdir():
            if path.name in (LOCK, BASELINE):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.state = {"schema_version": SCHEMA_VERSION, "stages": {}}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the directory against a second run; a directory made here and left empty by a failure is removed."""
        made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with lock_file(self / LOCK, f"{self.path} is in use by another run of slimexport."):
                yield
        finally:
            if made and not any(self.path.iterdir()):
                self.path.rmdir()


@contextmanager
def lock_file(path: Path, busy: str, seconds: float = 0.0) -> Iterator[None]:
    """An operating-system lock, gone with the process; waits up to `seconds`, then raises BadInputError(busy)."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise BadInputError(busy) from None
    try:
        yield
    finally:
        if not seconds:  # nobody waits for it, so nobody can be handed a lock on a file that is gone
            path.unlink(missing_ok=True)
        lock.release()


def _plain(value: Any) -> Any:
    """As it comes back from JSON, so that keys compare equal after a round trip."""
    import json

    return json.loads(json.dumps(value, default=str))
