"""The ordered stages (DESIGN.md, "The road"): what the CLI and the Python API call.

Every function takes a run directory, does its stages, and leaves their results in it; `run` does all. A stage that is
done already with the same inputs is skipped under `resume`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.artifacts import (
    ExportArtifact,
    ModelSource,
    PruningPlan,
    ShrunkCheckpoint,
    VerificationReport,
    from_dict,
    read_json,
    sha256_file,
    staged_directory,
    to_dict,
    write_json,
)
from slimexport.config import RunConfig, make_config
from slimexport.errors import BadInputError
from slimexport.options import STAGES
from slimexport.progress import Progress
from slimexport.run_directory import (
    BASELINE,
    CHECKPOINT,
    NUMERICS,
    PLAN,
    PRUNE,
    REPORT,
    VERIFICATION,
    WORK,
    PruneRecord,
    RunDirectory,
    VerifyRecord,
)

if TYPE_CHECKING:
    from slimexport.artifacts import LoadedModel
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
    config = _absolute(config)
    _check_targets(config)
    directory = RunDirectory(Path(output))
    with directory.locked(force=force):
        _prune(directory, config, force=force, resume=resume, progress=progress, evaluated=True)
        _export(directory, config, progress)
        _verify(directory, config, progress)
        return _report(directory, config, progress)


def plan(config: RunConfig) -> PruningPlan:
    """Legal sizes, counts and estimates; reads the config of the model and no weights."""
    from slimexport.loading import load_config
    from slimexport.pruning.cost import with_cost

    model_config, architecture = load_config(config)
    stored = str(getattr(model_config, "dtype", None) or "float32").removeprefix("torch.")
    made = _make_plan(config, architecture, stored if config.save_dtype == "auto" else config.save_dtype)
    return with_cost(made, architecture, config)


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
    with directory.locked(force=force):
        progress = progress or Progress(quiet=True)
        return _prune(directory, _absolute(config), force=force, resume=resume, progress=progress)


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
        config = _config_of(directory, overrides)
        _check_targets(config)
        if directory.done("export") and not force and not resume:
            raise BadInputError(f"{output} is exported already: --force replaces it, --resume keeps what is the same.")
        return _export(directory, config, progress or Progress(quiet=True), force=force)


def verify(
    output: str | Path,
    overrides: dict[str, Any] | None = None,
    *,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> VerificationReport:
    """Measures the exported graphs in `output` anew (with `resume`: only if it was not done with these options).

    `force` changes nothing: measuring replaces no files but its own result.
    """
    directory = RunDirectory(Path(output))
    with directory.locked(must_exist=True):
        config = _config_of(directory, overrides)
        return _verify(directory, config, progress or Progress(quiet=True), again=not resume)


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
        return _report(directory, _config_of(directory, overrides), progress or Progress(quiet=True))


# ------------------------------------------------------------------------------------------------------------ helpers


def _config_of(directory: RunDirectory, overrides: dict[str, Any] | None) -> RunConfig:
    """What the run was made with, and what this command changes."""
    values = {**directory.state.get("config", {}), **(overrides or {})}
    return _absolute(make_config(values, "options", overrides or {}))


def _absolute(config: RunConfig) -> RunConfig:
    """Paths that exist become absolute: later stages may be called from another directory."""
    found = {
        name: str(Path(value).expanduser().resolve())
        for name in ("model", "calibration", "eval_text")
        if Path(value := getattr(config, name)).expanduser().exists()
    }
    if config.baseline_cache:
        found["baseline_cache"] = config.baseline_cache.expanduser().resolve()  # type: ignore[assignment]
    return config.model_copy(update=found)


def _check_targets(config: RunConfig) -> None:
    """Unknown targets and absent providers are said before minutes of pruning."""
    from slimexport.runtime import require_provider
    from slimexport.targets import registry as targets

    require_provider(config.provider)
    for name in config.target:
        targets.get(name)
    if len(set(config.target)) < len(config.target):
        raise BadInputError(f"A target is named twice: {', '.join(config.target)}.")
    if config.baseline_cache and config.baseline_cache.exists() and not config.baseline_cache.is_dir():
        raise BadInputError(f"The baseline cache {config.baseline_cache} is not a directory.")


def _fields(config: RunConfig, *stages: str) -> dict[str, Any]:
    """The part of the config that decides the results of `stages`."""
    data = config.model_dump(mode="json")
    names = [name for stage in stages for name in STAGES[stage] if name != "baseline_cache"]
    return {name: data[name] for name in names}


def _make_plan(config: RunConfig, architecture: Any, stored_dtype: str) -> PruningPlan:
    from slimexport.pruning.criteria import registry as criteria
    from slimexport.pruning.planner import make_plan

    criteria.get(config.criterion)
    return make_plan(
        architecture,
        ratio=config.ratio,
        criterion=config.criterion,
        allocation=config.resolved_allocation,
        layout=config.resolved_layout,
        round_to=config.round_to,
        first_ratio=config.first_ratio,
        head_weight=config.head_weight,
        stored_dtype=stored_dtype,
    )


# -------------------------------------------------------------------------------------------------------------- prune


def _prune(
    directory: RunDirectory,
    config: RunConfig,
    *,
    force: bool,
    resume: bool,
    progress: Progress,
    evaluated: bool = False,
) -> ShrunkCheckpoint:
    """`evaluated`: a verify stage follows, so its text is looked at before minutes are spent on pruning."""
    from slimexport.calibration import calibrate, check_overlap, evaluation_ids
    from slimexport.environment import environment
    from slimexport.loading import load_model
    from slimexport.pruning.blocks import DirectorySink
    from slimexport.pruning.stage import numbers, prune_model, save_dtype_of

    directory.check_free(force=force, resume=resume)
    if force:
        directory.check_holds_none([Path(p) for p in (config.model, config.calibration, config.eval_text)])
    if resume and directory.state.get("config"):
        _check_same_options(directory, config)
        if directory.done("prune"):
            _check_same_source(directory, config)
            return directory.read(PRUNE, PruneRecord).checkpoint

    started = time.monotonic()
    with progress.stage("load"):
        loaded = load_model(config)
        progress.note(f"{loaded.source.name}: {_sizes(loaded)}")
    plan_made = _make_plan(config, loaded.architecture, save_dtype_of(config, loaded))
    with progress.stage("calibrate"):
        calibration = calibrate(config, loaded.tokenizer, loaded.model, progress.update)
        text = calibration.source
        if evaluated:
            check_overlap(calibration, evaluation_ids(config, loaded.tokenizer, text))
            _check_windows(config, loaded.model.config)
        progress.note(f"{text.tokens} tokens of {text.name}")
    # What the user could have got wrong has been looked at: from here on the directory is ours to write.
    if force:
        directory.clear()
    resolved = config.model_dump(mode="json")
    if evaluated or not directory.state.get("config"):
        directory.save(config=resolved)
    directory.save(environment=environment(cuda=True), source=to_dict(loaded.source))
    directory.write(PLAN, plan_made)
    key = {**_fields(config, "load", "calibrate", "prune"), "source": loaded.source.fingerprint, "text": text.sha256}
    with progress.stage("prune"):
        for note in plan_made.notes:
            progress.note(note)
        identity = {**key, **numbers(config, loaded)}
        sink = DirectorySink(directory / WORK, loaded.architecture, identity, resume=resume)
        if sink.finished():
            progress.note(f"going on after block {sink.finished()} of {len(plan_made.blocks)}")
        pruned = prune_model(loaded, plan_made, calibration, config, sink=sink, progress=progress.update)
    with progress.stage("shrink"):
        checkpoint = _shrink(directory, pruned, loaded, config)
    directory.write(PRUNE, PruneRecord(pruned.trace, text, checkpoint))
    directory.finish("prune", key, time.monotonic() - started)
    sink.discard()
    return checkpoint


def _check_windows(config: RunConfig, model_config: Any) -> None:
    """What the verify stage would refuse, or could not measure, on this model."""
    positions = getattr(model_config, "max_position_embeddings", None)
    wanted = {"eval_window": config.eval_window}
    if config.latency_runs:
        wanted["prompt_lengths"] = max(config.prompt_lengths, default=0)
    for name, value in wanted.items():
        if positions and value > positions:
            raise BadInputError(f"{name} {value} is longer than the model's {positions} positions.")


def _shrink(directory: RunDirectory, pruned: Any, loaded: LoadedModel, config: RunConfig) -> ShrunkCheckpoint:
    """Writes the checkpoint aside, reloads it in a fresh process, and only then puts it into place."""
    import dataclasses

    from slimexport.checkpoint.card import model_card
    from slimexport.checkpoint.save import check_round_trip, checkpoint_artifact, save_checkpoint

    architecture = loaded.architecture.with_blocks(pruned.plan.blocks)
    with staged_directory(directory / CHECKPOINT) as place:
        card = model_card(loaded.source, pruned.plan, pruned.calibration)
        files = save_checkpoint(pruned.model, pruned.tokenizer, architecture, pruned.plan, place, card=card)
        difference = check_round_trip(pruned.model, place, config.seed)
        made = checkpoint_artifact(place, architecture, files, difference)
    return dataclasses.replace(made, path=CHECKPOINT)


def _check_same_options(directory: RunDirectory, config: RunConfig) -> None:
    """--resume is for the same run: names the first option of the pruning stages that differs."""
    before = make_config(directory.state["config"], str(directory / "run.json"))
    old, new = ({"model": c.model, **_fields(c, "load", "calibrate", "prune")} for c in (before, config))
    for name, value in new.items():
        if old[name] != value:
            raise BadInputError(
                f"Cannot resume {directory.path}: it was started with {name} = {old[name]!r}, not {value!r}. "
                "Use the same options, or start over with --force."
            )


def _check_same_source(directory: RunDirectory, config: RunConfig) -> None:
    """A finished checkpoint counts only while the model it was made from is the one that is asked for."""
    from slimexport.loading import fingerprint, locate

    if fingerprint(locate(config)) != directory.state["source"]["fingerprint"]:
        raise BadInputError(f"{config.model} has changed since {directory.path} was made from it: --force starts over.")


def _sizes(loaded: LoadedModel) -> str:
    estimates = loaded.architecture.estimates(1)
    return (
        f"{loaded.architecture.family.model_type}, {len(loaded.architecture.blocks)} blocks, "
        f"{estimates.parameters / 1e6:.1f} M parameters, stored as {loaded.source.stored_dtype}"
    )


# ------------------------------------------------------------------------------------------------------------- export


def _export(
    directory: RunDirectory, config: RunConfig, progress: Progress, *, force: bool = False
) -> dict[str, ExportArtifact]:
    from slimexport.exporting import baseline_for, export_checkpoint
    from slimexport.targets.base import load_artifact

    if not directory.done("prune"):
        raise BadInputError(f"{directory.path} holds no finished checkpoint; run with --resume to finish it.")
    key = {"prune": directory.key("prune"), **_fields(config, "export")}
    names = _exports(config)
    if directory.done("export", key) and not force and all((directory / n).is_dir() for n in names):
        return {name: load_artifact(directory / name) for name in names}
    checkpoint = directory.read(PRUNE, PruneRecord).checkpoint
    _check_files(directory / CHECKPOINT, checkpoint.files)
    directory.begin("export")
    started = time.monotonic()
    source = from_dict(ModelSource, directory.state["source"], "run.json")
    numerics: dict[str, Any] = {}
    with progress.stage("export"):
        for target in config.target:
            numerics[target] = export_checkpoint(directory / CHECKPOINT, directory / target, target, config, progress)
            if config.baseline:
                place = f"{BASELINE}/{target}"
                numerics[place] = baseline_for(source, directory / place, target, config, progress)
    write_json(directory / NUMERICS, numerics)
    directory.save_config(_fields(config, "export"))
    directory.finish("export", key, time.monotonic() - started)
    return {name: load_artifact(directory / name) for name in names}


def _exports(config: RunConfig) -> list[str]:
    """The exported directories of a run, the first of them being the one that is measured."""
    return [*config.target, *(f"{BASELINE}/{t}" for t in config.target if config.baseline)]


def _check_files(place: Path, files: Mapping[str, str]) -> None:
    """Raises BadInputError for the first file that is not what its stage wrote."""
    for name, digest in files.items():
        path = place / name
        if not path.is_file() or sha256_file(path) != digest:
            raise BadInputError(
                f"{path} is not the file that was written here: its sha256 differs. --force starts over."
            )


# ------------------------------------------------------------------------------------------------------------- verify


def _verify(
    directory: RunDirectory, config: RunConfig, progress: Progress, *, again: bool = False
) -> VerificationReport:
    from slimexport import verification
    from slimexport.calibration import calibrate, check_overlap, evaluation_ids
    from slimexport.loading import Located, load_tokenizer
    from slimexport.targets.base import load_artifact

    if not directory.done("export"):
        raise BadInputError(f"{directory.path} is not exported yet; `slimexport export {directory.path}` does that.")
    record = directory.read(PRUNE, PruneRecord)
    plan_made = directory.read(PLAN, PruningPlan)
    tokenizer = load_tokenizer(Located(str(directory.path), "directory", directory / CHECKPOINT), config)
    text = evaluation_ids(config, tokenizer, record.calibration)
    key = {"export": directory.key("export"), "text": text.source.sha256, **_fields(config, "verify")}
    if directory.done("verify", key) and not again:
        return directory.read(VERIFICATION, VerifyRecord).report
    if config.calibration != "self":  # the model's own samples are in no text
        calibration = calibrate(config, tokenizer)
        if calibration.source.sha256 != record.calibration.sha256:
            raise BadInputError(f"The calibration text {config.calibration} has changed since the model was pruned.")
        check_overlap(calibration, text)
    target = config.target[0]
    shrunk = load_artifact(directory / target)
    baseline = load_artifact(directory / BASELINE / target) if config.baseline else None
    for artifact in (shrunk, baseline):
        if artifact:
            _check_files(Path(artifact.path), artifact.files)
    numerics = read_json(directory / NUMERICS)
    directory.begin("verify")
    started = time.monotonic()
    with progress.stage("verify"):
        made = verification.verify(
            shrunk,
            baseline,
            text,
            config,
            plan_made.estimates,
            plan_made.dense_estimates,
            numerics[target],
            numerics[f"{BASELINE}/{target}"] if baseline else None,
            progress.update,
        )
    directory.write(VERIFICATION, VerifyRecord(made, text.source))
    directory.save_config(_fields(config, "verify"))
    directory.finish("verify", key, time.monotonic() - started)
    return made


# ------------------------------------------------------------------------------------------------------------- report


def _report(directory: RunDirectory, config: RunConfig, progress: Progress) -> Report:
    from slimexport import gate, reporting
    from slimexport.targets.base import load_artifact

    if not directory.done("verify"):
        raise BadInputError(f"{directory.path} is not verified yet; `slimexport verify {directory.path}` does that.")
    record = directory.read(PRUNE, PruneRecord)
    verified = directory.read(VERIFICATION, VerifyRecord)
    made = reporting.Report(
        source=from_dict(ModelSource, directory.state["source"], "run.json"),
        config=config.model_dump(mode="json"),
        plan=directory.read(PLAN, PruningPlan),
        checkpoint=record.checkpoint,
        verification=verified.report,
        gates=gate.evaluate(config.all_gates(), verified.report),
        pruning=reporting.PruningSummary.from_trace(record.trace) if record.trace else None,
        calibration=record.calibration,
        evaluation=verified.evaluation,
        exports={name: load_artifact(directory / name) for name in _exports(config)},
        environment=directory.state["environment"],
        seconds=directory.seconds(),
        command=_command(),
    )
    with progress.stage("report"):
        reporting.write_report(made, directory / REPORT)
    directory.save_config(_fields(config, "gate"))
    return made


def _command() -> str | None:
    """What was typed, where it was the command line."""
    import shlex
    import sys

    name = Path(sys.argv[0]).name
    return shlex.join([name, *sys.argv[1:]]) if name in ("slimexport", "optimum-cli") else None
