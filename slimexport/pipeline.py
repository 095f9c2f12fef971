"""The ordered stages (DESIGN.md, "The road"): what the CLI and the Python API call.

Every function takes a run directory, does its stages in it under a lock, and leaves their results there; `run` does
all. Under `resume` a stage that was done with the same options, model and texts is skipped.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport import ranks
from slimexport.artifacts import ExportArtifact, PruningPlan, Recovery, ShrunkCheckpoint, VerificationReport
from slimexport.config import RECOVERY, RunConfig
from slimexport.errors import BadInputError
from slimexport.progress import Progress
from slimexport.run_directory import RunDirectory
from slimexport.stages.export import export_stage
from slimexport.stages.inputs import absolute, check_targets, config_of, fields_of
from slimexport.stages.plan import known_costs, measured_costs, plan_stage
from slimexport.stages.prune import assist as assist_prune
from slimexport.stages.prune import block_by_block, prune_stage
from slimexport.stages.recover import assist as assist_recover
from slimexport.stages.recover import recover_stage
from slimexport.stages.report import report_stage
from slimexport.stages.verify import verify_stage

if TYPE_CHECKING:
    from slimexport.reporting import Report


def run(
    config: RunConfig,
    output: str | Path,
    *,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """All stages. A failed gate does not raise: `report.passed` is False (the CLI exits 3).

    Raises SlimExportError with the exit code that the CLI returns.
    """
    progress = progress or Progress(quiet=True)
    config = absolute(config)
    check_targets(config)
    if config.against:
        from slimexport.gates import earlier
        from slimexport.loading import fingerprint, locate

        _check_elsewhere(config.against, Path(output))
        earlier.read_of(config.against, fingerprint(locate(config)))  # said before minutes of pruning
    directory = RunDirectory(Path(output))
    with directory.locked(force=force):
        with ranks.joined(config.device) as them:
            prune_stage(
                directory, config, force=force, resume=resume, progress=progress, evaluated=True, ranks=them
            )  # fmt: skip
            if config.recover != "none":
                recover_stage(directory, config, progress, resume=resume, ranks=them)
        if config.recover == "none" and directory.done("recover"):
            before = directory.key("recover")["recover"]
            raise BadInputError(
                f"{output} holds a model that was trained: name --recover {before} as well, or --force starts over."
            )
        export_stage(directory, config, progress)
        verify_stage(directory, config, progress)
        directory.save_config(fields_of(config, "gate"))  # the run's own gates; those of `report` hold once
        return report_stage(directory, config, progress)


def _check_elsewhere(against: Path, output: Path) -> None:
    """A run compared with itself has never become worse."""
    if against.resolve().is_relative_to(output.resolve()):
        raise BadInputError(f"{against} is in {output}, whose report is replaced: copy it elsewhere before.")


def plan(config: RunConfig, progress: Progress | None = None) -> PruningPlan:
    """Legal sizes, counts and estimates; reads the config of the model and no weights.

    An allocation that is planned from measured costs takes them from `config.costs`, or measures them and keeps them
    there; without such a file the plan is that of `incremental`, with a note: totals are the same.
    """
    from slimexport.calibration import calibrate
    from slimexport.loading import (
        files_of,
        fingerprint,
        load_config,
        load_model,
        load_tokenizer,
        locate,
        resolve_device,
    )
    from slimexport.pruning import allocation as allocations
    from slimexport.pruning.cost import with_cost
    from slimexport.pruning.memory import fitting
    from slimexport.pruning.stage import cost_identity
    from slimexport.pruning.states import Keeper, Room
    from slimexport.stages.out_of_memory import with_less
    from slimexport.texts import mix

    config = absolute(config)
    progress = progress or Progress(quiet=True)
    located = locate(config)
    model_config, architecture = load_config(config, located)
    stored = str(getattr(model_config, "dtype", None) or "float32").removeprefix("torch.")
    stored = stored if config.save_dtype == "auto" else config.save_dtype
    costs = None
    streamed = block_by_block(config) and files_of(located, model_config, architecture) is not None
    made = plan_stage(config, architecture, stored)
    if config.ratio and allocations.needs_costs(allocations.registry.get(config.resolved_allocation)):
        if config.costs is None:
            note = (
                f"allocation {config.resolved_allocation} chooses the sizes from costs that it measures while it runs; "
                f"shown is {made.allocation}. --costs FILE measures them now and keeps them"
            )
            return with_cost(replace(made, notes=(*made.notes, note)), architecture, config, streamed=streamed)
        of = fingerprint(located)
        costs = known_costs(config.costs, cost_identity(of, config, None))
        if costs is not None and not mix.writes(config.calibration):  # what the model writes is not written for this
            text = calibrate(config, load_tokenizer(located, config)).source.sha256
            known_costs(config.costs, cost_identity(of, config, text))
        if costs is None:
            with progress.stage("load"):
                loaded = load_model(config, streamed=streamed)
            with progress.stage("calibrate"):
                calibration = calibrate(config, loaded.tokenizer, loaded.model, progress.update)
            device = resolve_device(config.device)
            needs = fitting(made, architecture, config, device, streamed=streamed)
            costs = with_less(
                lambda room: measured_costs(loaded, calibration, config, None, progress, room=room),
                Room(Keeper(needs.place, device)), progress, config, again=False, less="fewer --probe-tokens, --fast",
            )  # fmt: skip
        made = plan_stage(config, architecture, stored, costs)
        if made.allocation != config.resolved_allocation:
            note = (
                f"allocation {config.resolved_allocation} tries whole plans while it runs; shown is {made.allocation}"
            )
            made = replace(made, notes=(*made.notes, note))
    return with_cost(made, architecture, config, streamed=streamed)


def prune(
    config: RunConfig,
    output: str | Path,
    *,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> ShrunkCheckpoint:
    """Load, calibrate, plan, prune, shrink: ends with `checkpoint/`, reloaded in a fresh process and compared."""
    directory = RunDirectory(Path(output))
    with directory.locked(force=force), ranks.joined(config.device) as them:
        progress = progress or Progress(quiet=True)
        return prune_stage(directory, absolute(config), force=force, resume=resume, progress=progress, ranks=them)


def assist(config: RunConfig, *, recovers: bool = True) -> None:
    """What every process but the first calls where torchrun started several (`ranks.is_first()` says which this is),
    while that one calls `run`, or with `recovers=False` `prune`: pruning and training are shared among all, the rest is
    the first one's."""
    config = absolute(config)
    with ranks.joined(config.device) as them:
        assist_prune(config, them)
        if recovers and config.recover != "none":
            assist_recover(them, config.model)


def assist_recovery(output: str | Path, overrides: dict[str, Any] | None = None) -> None:
    """As `assist`, while the first process calls `recover` on this directory, or on one that is the same elsewhere."""
    directory = RunDirectory(Path(output))
    directory.open()
    config = config_of(directory, overrides)
    with ranks.joined(config.device) as them:
        assist_recover(them, config.model)


def recover(
    output: str | Path,
    overrides: dict[str, Any] | None = None,
    *,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Recovery:
    """Trains the checkpoint in `output` toward the model that it was made from: ends with `recovered/`, in the same
    shape, which is what is exported from then on."""
    directory = RunDirectory(Path(output))
    with directory.locked(must_exist=True):
        config = config_of(directory, overrides)
        if config.recover == "none":
            config = config.model_copy(update={"recover": RECOVERY})
        if directory.done("recover") and not force and not resume:
            raise BadInputError(f"{output} is recovered already: --force replaces it, --resume keeps what is the same.")
        progress = progress or Progress(quiet=True)
        with ranks.joined(config.device) as them:
            return recover_stage(directory, config, progress, force=force, resume=resume, ranks=them)


def export(
    output: str | Path,
    overrides: dict[str, Any] | None = None,
    *,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, ExportArtifact]:
    """Exports the checkpoint in `output`, and the dense model beside it; names as in the run directory."""
    directory = RunDirectory(Path(output))
    with directory.locked(must_exist=True):
        config = config_of(directory, overrides)
        check_targets(config)
        if directory.done("export") and not force and not resume:
            raise BadInputError(f"{output} is exported already: --force replaces it, --resume keeps what is the same.")
        return export_stage(directory, config, progress or Progress(quiet=True), force=force)


def verify(
    output: str | Path,
    overrides: dict[str, Any] | None = None,
    *,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> VerificationReport:
    """Measures the exported graphs in `output` anew (with `resume`: only if it was not done with these options).

    Returns what was found of the first export; `verified` has it of all. `force` changes nothing: measuring replaces no
    files but its own result.
    """
    directory = RunDirectory(Path(output))
    with directory.locked(must_exist=True):
        config = config_of(directory, overrides)
        check_targets(config)
        return verify_stage(directory, config, progress or Progress(quiet=True), again=not resume)


def verified(output: str | Path) -> dict[str, VerificationReport]:
    """What was measured last of every export in `output`, by its name in the run directory, the first one first."""
    directory = RunDirectory(Path(output))
    with directory.locked(must_exist=True):
        record = directory.verified()
        return {record.first: record.report, **record.others}


def report(
    output: str | Path,
    overrides: dict[str, Any] | None = None,
    *,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Writes `report/` from what was measured, and applies the gates; measures nothing.

    `force` and `resume` change nothing: a report is always written anew.
    """
    directory = RunDirectory(Path(output))
    with directory.locked(must_exist=True):
        config = config_of(directory, overrides)
        if config.against:
            _check_elsewhere(config.against, directory.path)
        return report_stage(directory, config, progress or Progress(quiet=True))
