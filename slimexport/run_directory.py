"""The run directory (DESIGN.md): where every stage's result lies, what state it is in, and who may write.

run.json            resolved config, environment, source, stage states
plan.json           PruningPlan
costs.json          CostTable, where the allocation is planned from one
prune.json          trace per block, calibration text
recover.json        how the shrunk model was trained, where it was
checkpoint/         the shrunk Hugging Face directory
recovered/          the same, trained: what is exported where it is there
onnx/               the exported graph (one directory per target and precision: onnx-int8/)
baseline/onnx/      the dense model, same export
numerics.json       logits of the graphs against torch
verification.json   VerificationReport
tasks.json          what models answered in tasks of lm-eval, by the sums of their files
report/             report.json, report.md, report.html, junit.xml
.work/              of an unfinished prune stage: its blocks; supernet/ and search.json of allocation search; recovery/
                    of an unfinished training
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimexport.artifacts import (
    MANIFEST,
    SCHEMA_VERSION,
    BlockTrace,
    Recovery,
    ShrunkCheckpoint,
    TextSource,
    VerificationReport,
    from_dict,
    read_json,
    remove,
    to_dict,
    write_json,
)
from slimexport.errors import BadInputError

RUN, PLAN, COSTS, PRUNE, RECOVER = "run.json", "plan.json", "costs.json", "prune.json", "recover.json"
NUMERICS, VERIFICATION, TASKS = "numerics.json", "verification.json", "tasks.json"
CHECKPOINT, RECOVERED = "checkpoint", "recovered"
CHECKPOINTS = (RECOVERED, CHECKPOINT)  # the first that is there is the shrunk model
BASELINE, REPORT, WORK, LOCK = "baseline", "report", ".work", ".lock"
TRAINING = "recovery"  # in WORK
STAGE_ORDER = ("prune", "recover", "export", "verify")


@dataclass(frozen=True)
class PruneRecord:
    """prune.json: what was kept in every block, at what error and cost, and the checkpoint it became.

    Seconds of what goes before the first block: the curvature of the output, and planning by measured costs.
    """

    trace: tuple[BlockTrace, ...]
    calibration: TextSource
    checkpoint: ShrunkCheckpoint
    seconds_curvature: float = 0.0
    seconds_allocation: float = 0.0
    logit_scale: float = 1.0  # what the weight of the final norm was multiplied by


@dataclass(frozen=True)
class VerifyRecord:
    """verification.json: everything measured, and on which text."""

    report: VerificationReport
    evaluation: TextSource
    others: Mapping[str, VerificationReport] = field(default_factory=dict)  # of the exports but the first, by name
    first: str = "onnx"  # name of the first


def exports_in(path: Path, file: str) -> list[Path]:
    """`path`, where it holds `file`; else, where it is a run directory, every export and baseline that does."""
    if (path / file).is_file():
        return [path]
    if not (path / RUN).is_file():
        return []
    return [made.parent for where in (path, path / BASELINE) for made in sorted(where.glob(f"[!.]*/{file}"))]


def holds(place: Path, record: str, what: str, *, force: bool, resume: bool) -> bool:
    """Whether the directory `place` has something of ours, by the file `record` of a `what`.

    Raises BadInputError where it has anything else, or what neither may be replaced nor gone on with.
    """
    begun = f".{record}."  # of a process that was killed while it wrote the record
    content = [path.name for path in place.iterdir() if path.name != LOCK and not path.name.startswith(begun)]
    if not content:
        return False
    if record not in content:
        raise BadInputError(f"{place} is not empty and holds no {what} of slimexport; it is left alone.")
    if not force and not resume:
        raise BadInputError(f"{place} holds a {what} already: --force replaces it, --resume goes on with it.")
    return True


class RunDirectory:
    """Paths and stage states of one run. A stage is done when run.json says so, which is written last.

    Use it inside `locked()`, which reads run.json.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.state: dict[str, Any] = _empty_state()

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

    def begin(self, stage: str) -> None:
        """Before the first write of `stage`: it and all later ones no longer count as done, and no report says so."""
        position = STAGE_ORDER.index(stage)
        for name in STAGE_ORDER[position:]:
            self.state["stages"].pop(name, None)
        self.save()
        remove(self / REPORT)

    def finish(self, stage: str, key: dict[str, Any], seconds: float) -> None:
        self.state["stages"][stage] = {"key": _plain(key), "seconds": round(seconds, 3)}
        self.save()

    def save(self, **fields: Any) -> None:
        self.state.update(fields)
        write_json(self / RUN, self.state)

    def save_config(self, fields: dict[str, Any]) -> None:
        """Records what a finished stage was made with; the other fields stay as they are."""
        self.save(config={**self.state.get("config", {}), **fields})

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
        holds(self.path, RUN, "run", force=force, resume=resume)

    def check_holds_none(self, inputs: list[Path]) -> None:
        """Raises BadInputError where an input lies in this directory: replacing the run would destroy it."""
        for path in inputs:
            if path.resolve().is_relative_to(self.path.resolve()):
                raise BadInputError(f"{path} lies in {self.path}, which --force would replace; choose another output.")

    def clear(self) -> None:
        """Removes what slimexport wrote, but for the baseline, which is reused where its hash still fits.

        run.json is emptied first and never absent: a directory that is half cleared is still a run's.
        """
        self.state = _empty_state()
        self.save()
        ours = (PLAN, COSTS, PRUNE, RECOVER, NUMERICS, VERIFICATION, TASKS, CHECKPOINT, RECOVERED, REPORT, WORK)
        for name in (*ours, *self.exported()):
            remove(self / name)
        for partial in [*self.path.glob(".*.partial"), *self.path.glob(f".{RUN}.*")]:
            remove(partial)

    def recovered(self) -> Recovery | None:
        """How the shrunk model was trained; None where it was not."""
        return self.read(RECOVER, Recovery) if self.done("recover") else None

    def shrunk(self) -> ShrunkCheckpoint:
        """What is exported: the recovered checkpoint where there is one, else the pruned one."""
        recovered = self.recovered()
        if recovered is not None and recovered.checkpoint is not None:
            return recovered.checkpoint
        pruned: PruneRecord = self.read(PRUNE, PruneRecord)
        return pruned.checkpoint

    def verified(self) -> VerifyRecord:
        """Raises BadInputError where nothing was measured of what is here now."""
        if not self.done("verify"):
            raise BadInputError(f"{self.path} is not verified yet; `slimexport verify {self.path}` does that.")
        return self.read(VERIFICATION, VerifyRecord)

    def exported(self) -> list[str]:
        """Names of the exported directories, of this run's options or of others."""
        return sorted(made.parent.name for made in self.path.glob(f"[!.]*/{MANIFEST}"))

    @contextmanager
    def locked(self, *, must_exist: bool = False, force: bool = False) -> Iterator[None]:
        """Holds the directory against a second run, and reads run.json (with `force` a broken one counts as empty).

        Directories made here and left empty by a failure are removed. With `must_exist`, BadInputError where there is
        no run.
        """
        if must_exist and not (self / RUN).is_file():
            raise BadInputError(
                f"{self.path} is no run directory (no {RUN}); `slimexport prune MODEL -o DIR` makes one."
            )
        if self.path.exists() and not self.path.is_dir():
            raise BadInputError(f"{self.path} is a file; the output must be a directory.")
        if self.path.is_symlink() and not self.path.exists():
            raise BadInputError(f"{self.path} is a link to nowhere.")
        made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with lock_file(self / LOCK, f"{self.path} is in use by another run of slimexport."):
                self.open(force=force)
                yield
        finally:
            for path in made:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()

    def open(self, *, force: bool = False) -> None:
        """Reads run.json where there is one; for who does not write, this needs no lock."""
        if not (self / RUN).is_file():
            return
        try:
            state = read_json(self / RUN)
            if not isinstance(state, dict) or not isinstance(state.get("stages"), dict):
                raise BadInputError(f"{self / RUN} is no record of a run; start over with --force.")
            if state.get("schema_version") != SCHEMA_VERSION:
                raise BadInputError(
                    f"{self / RUN} has schema_version {state.get('schema_version')}, "
                    f"this slimexport reads {SCHEMA_VERSION}."
                )
            if state["stages"] and not isinstance(state.get("config"), dict):
                raise BadInputError(f"{self / RUN} holds no config; start over with --force.")
        except BadInputError:
            if not force:
                raise
            return
        self.state = state


def _empty_state() -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "stages": {}}


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
