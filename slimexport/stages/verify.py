"""Measures the exported graphs, shrunk beside dense."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from slimexport.artifacts import PruningPlan, VerificationReport, read_json
from slimexport.environment import environment
from slimexport.errors import BadInputError
from slimexport.run_directory import (
    BASELINE,
    NUMERICS,
    PLAN,
    PRUNE,
    VERIFICATION,
    PruneRecord,
    RunDirectory,
    VerifyRecord,
)
from slimexport.stages.inputs import (
    ANEW,
    check_files,
    check_windows,
    decided,
    dense_model,
    earlier_exports,
    export_names,
    exports,
    fields_of,
    reference,
)
from slimexport.stages.tasks import ask_tasks, questions_of, with_tasks

if TYPE_CHECKING:
    from slimexport.config import RunConfig
    from slimexport.gates.decide import Earlier
    from slimexport.progress import Progress
    from slimexport.verification import EvaluationText
    from slimexport.verification.perplexity import Accuracy


def _decided(
    config: RunConfig, name: str, compared: Mapping[str, Earlier], first: bool, report: VerificationReport
) -> bool:
    """Whether no gate on a time of the export `name` waits for further rounds."""
    from slimexport.gates.decide import worth_more_runs

    return not worth_more_runs(decided(config, name, report, compared, first))


def _waits(directory: RunDirectory, config: RunConfig, kept: VerifyRecord) -> bool:
    """Whether a gate waits for further rounds, and there may be more than were measured (without this gate)."""
    compared = earlier_exports(config, directory.state, kept.evaluation, needed=False)
    found = {kept.first: kept.report, **kept.others}
    return any(
        0 < of.latency.get("runs", 0) < config.max_latency_runs
        and not _decided(config, name, compared, name == kept.first, of)
        for name, of in found.items()
    )


def _light_accuracy(directory: RunDirectory, config: RunConfig, text: EvaluationText, progress: Progress) -> Accuracy:
    """Of the checkpoint beside the model it was made from, neither of which is in memory as a whole."""
    import numpy as np

    from slimexport.loading import load_model, resolve_device
    from slimexport.pruning.states import Keeper, Room
    from slimexport.verification.streamed import streamed_accuracy

    shrunk = load_model(config.model_copy(update={"model": str(directory / directory.shrunk().path)}), streamed=True)
    fingerprint = directory.state["source"]["fingerprint"]
    dense = dense_model(config, fingerprint, streamed=True, advice=ANEW) if config.baseline else None
    for model in (shrunk, dense):
        if model is not None and model.files is None:
            progress.note(f"{model.source.name} cannot be read block by block: it is in memory as a whole")
    return streamed_accuracy(
        shrunk,
        dense,
        np.asarray(text.input_ids, np.int64),
        config,
        Room(Keeper("file", resolve_device(config.device), directory.path)),
        lambda done, total: progress.update(done, total, "blocks of both models"),
    )


def verify_stage(
    directory: RunDirectory, config: RunConfig, progress: Progress, *, again: bool = False
) -> VerificationReport:
    from slimexport import verification
    from slimexport.calibration import calibrate, check_overlap, evaluation_ids
    from slimexport.loading import Located, load_tokenizer
    from slimexport.recovery.texts import check_apart_afterwards
    from slimexport.targets.base import load_artifact
    from slimexport.texts import mix
    from slimexport.texts.distance import warn_if_far

    if not directory.done("export"):
        raise BadInputError(f"{directory.path} is not exported yet; `slimexport export {directory.path}` does that.")
    record = directory.read(PRUNE, PruneRecord)
    plan_made = directory.read(PLAN, PruningPlan)
    shrunk = directory.shrunk()
    tokenizer = load_tokenizer(Located(str(directory.path), "directory", directory / shrunk.path), config)
    text = evaluation_ids(config, tokenizer, record.calibration)
    key = {"export": directory.key("export"), "text": text.source.sha256, **fields_of(config, "verify")}
    if config.tasks:
        key["questions"] = questions_of(config)
    if directory.done("verify", key) and not again:
        kept = directory.read(VERIFICATION, VerifyRecord)
        if not _waits(directory, config, kept):
            return kept.report
        progress.note("a gate on a time is undecided: measuring anew, with as many rounds as it takes")
    far: str | None = None
    if not (record.calibration.written or mix.written(config.calibration)):  # what the model wrote is in no text
        calibration = calibrate(config, tokenizer)  # a mix without what the model wrote
        if calibration.source.read != record.calibration.read:
            raise BadInputError(f"The calibration text {config.calibration} has changed since the model was pruned.")
        check_overlap(calibration, text)
        far = warn_if_far(calibration.input_ids, text.input_ids)
    check_apart_afterwards(directory.recovered(), text, tokenizer)
    made_of = {name: load_artifact(directory / name) for name in export_names(config)}
    for artifact in made_of.values():
        check_files(
            Path(artifact.path), artifact.files, advice=f"slimexport export {directory.path} --force makes it anew"
        )
    numerics = read_json(directory / NUMERICS)
    dense = f"{BASELINE}/{reference(config)}"  # which accuracy is held to: in full precision
    # Of the machine that measures, whichever one pruned; written as the stage begins, when all was looked at.
    directory.state["environment"] = environment(cuda=True)
    compared = earlier_exports(config, directory.state, text.source, needed=False)
    positions = read_json(directory / shrunk.path / "config.json").get("max_position_embeddings")
    check_windows(config, positions, prompts=False)
    found: dict[str, VerificationReport] = {}
    started = time.monotonic()
    with progress.stage("verify"):
        answers = ask_tasks(tuple(exports(config)), directory, config, made_of, dense, shrunk, tokenizer, progress)
        directory.begin("verify")  # what may not do has been looked at: until here the earlier result stands
        light = _light_accuracy(directory, config, text, progress) if config.verify == "light" else None
        for name in exports(config):
            if light is not None:
                found[name] = verification.verify_light(made_of[name], text, light, numerics[name])
                continue
            progress.note(f"{name}: measuring")
            found[name] = verification.verify(
                made_of[name],
                made_of.get(f"{BASELINE}/{name}"),
                text,
                config,
                plan_made.estimates,
                plan_made.dense_estimates,
                numerics[name],
                numerics.get(f"{BASELINE}/{name}"),
                progress.update,
                dense=made_of.get(dense),
                decode=partial(tokenizer.decode, skip_special_tokens=False),
                enough=partial(_decided, config, name, compared, not found),
            )
        found = {name: with_tasks(report, name, answers) for name, report in found.items()}
    made, *_ = found.values()
    if far:
        progress.note(far)
        made = replace(made, notes=(*made.notes, far))
    others = dict(list(found.items())[1:])
    directory.write(VERIFICATION, VerifyRecord(made, text.source, others, next(iter(found))))
    directory.save_config(fields_of(config, "verify"))
    directory.finish("verify", key, time.monotonic() - started)
    return made
