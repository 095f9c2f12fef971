"""Load, calibrate, plan, prune, shrink: from a dense model to `checkpoint/`."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from slimexport.artifacts import (
    CalibrationSet,
    PruningPlan,
    ShrunkCheckpoint,
    from_dict,
    remove,
    staged_directory,
    to_dict,
)
from slimexport.config import RunConfig, make_config
from slimexport.errors import BadInputError
from slimexport.progress import Progress
from slimexport.ranks import ALONE, Message, Ranks, check_alike, versions
from slimexport.run_directory import CHECKPOINT, PLAN, PRUNE, TRAINING, WORK, PruneRecord, RunDirectory
from slimexport.stages.inputs import (
    check_possible,
    check_same_text,
    check_windows,
    fields_of,
    input_paths,
    rounds_by_text,
)
from slimexport.stages.plan import assist_planning, known_costs, measured_plan, plan_stage

if TYPE_CHECKING:
    from slimexport.architectures.base import Architecture
    from slimexport.loading import LoadedModel
    from slimexport.pruning.curvature import BlockCurvature
    from slimexport.pruning.stage import PrunedModel
    from slimexport.pruning.states import Room


def prune_stage(
    directory: RunDirectory,
    config: RunConfig,
    *,
    force: bool,
    resume: bool,
    progress: Progress,
    evaluated: bool = False,
    ranks: Ranks = ALONE,
) -> ShrunkCheckpoint:
    """`evaluated`: export and verify follow, so what they need is looked at before minutes are spent on pruning.

    `ranks`: this is the first of them; the others `assist`.
    """
    from slimexport.calibration import calibrate, check_overlap, evaluation_ids, rounding_windows
    from slimexport.environment import environment
    from slimexport.loading import load_model, resolve_device
    from slimexport.pruning import allocation as allocations
    from slimexport.pruning.blocks import DirectorySink
    from slimexport.pruning.memory import fitting
    from slimexport.pruning.stage import (
        check_criterion,
        cost_identity,
        curvature_of,
        numbers,
        prepare,
        prune_model,
        save_dtype_of,
        weighs_errors,
    )
    from slimexport.pruning.states import Keeper, Room
    from slimexport.recovery import texts
    from slimexport.stages.out_of_memory import with_less

    directory.check_free(force=force, resume=resume)
    if force:
        directory.check_holds_none(input_paths(config))
    if resume and directory.state.get("config"):
        _check_same_options(directory, config)
        if directory.done("prune"):
            _check_same_source(directory, config)
            ranks.told(lambda: Message({"done": True}))
            for path in (directory / WORK).glob("*"):  # left where it was killed with nothing else to do
                if path.name != TRAINING:
                    remove(path)
            return directory.read(PRUNE, PruneRecord).checkpoint

    started = time.monotonic()
    ranks.told(lambda: Message({"done": False}))
    with progress.stage("load"):
        loaded = load_model(config, streamed=block_by_block(config))
        progress.note(f"{loaded.source.name}: {_sizes(loaded)}")
    check_criterion(loaded.architecture, config)
    if evaluated:
        check_possible(loaded.model.config, loaded.tokenizer, loaded.architecture, config)
    allocation = allocations.registry.get(config.resolved_allocation)
    plan_made = plan_stage(config, loaded.architecture, save_dtype_of(config, loaded))
    device = resolve_device(config.device)
    streamed = loaded.files is not None
    needs = fitting(plan_made, loaded.architecture, config, device, streamed=streamed, ranks=ranks.size)
    if allocations.needs_costs(allocation):
        known_costs(config.costs, cost_identity(loaded.source.fingerprint, config, None))
    with progress.stage("calibrate"):
        calibration = calibrate(config, loaded.tokenizer, loaded.model, progress.update)
        text = calibration.source
        if evaluated:
            evaluation = evaluation_ids(config, loaded.tokenizer, text)
            check_overlap(calibration, evaluation)
            if rounds_by_text(config) and config.rounding_tokens > config.calibration_tokens:
                rounding_windows(config, loaded.tokenizer)  # that there is so much
            if config.recover != "none":
                texts.check_ahead(config, loaded.tokenizer, loaded.model, evaluation)
            check_windows(config, getattr(loaded.model.config, "max_position_embeddings", None))
        progress.note(f"{text.tokens} tokens of {text.name}")
    if ranks.size > 1:
        check_alike(ranks, _alike(config, loaded, calibration))
        progress.note(f"{ranks.size} ranks share them")
    if allocations.needs_costs(allocation):
        known_costs(config.costs, cost_identity(loaded.source.fingerprint, config, text.sha256))
    # What the user could have got wrong has been looked at: from here on the directory is ours to write.
    if force:
        directory.clear()
    resolved = config.model_dump(mode="json")
    if evaluated or not directory.state.get("config"):
        directory.save(config=resolved)
    directory.save(environment=environment(cuda=True), source=to_dict(loaded.source))
    if not resume:
        remove(directory / WORK)
    (directory / WORK).mkdir(exist_ok=True)
    room = Room(Keeper(needs.place, device, directory / WORK))
    if needs.place != "device":
        where = "the memory of the host" if needs.place == "host" else f"a file in {directory / WORK}"
        progress.note(f"hidden states live in {where}")
    curvature: Sequence[BlockCurvature] = ()
    weighing = planning = None
    spent = [time.monotonic()]
    if weighs_errors(config) and (config.ratio or plan_made.blocks != plan_made.dense):
        with progress.stage("curvature"):
            weighing = partial(curvature_of, loaded, calibration, config)
            curvature = with_less(weighing, room, progress, config)
    spent.append(time.monotonic())
    if allocations.needs_costs(allocation) and config.ratio:
        planning = partial(
            measured_plan, directory.path, loaded, calibration, config, progress, curvature, ranks=ranks
        )  # fmt: skip
        # Its probes are one batch however small.
        plan_made = with_less(planning, room, progress, config, again=False, less="fewer --probe-tokens, --fast")
    spent.append(time.monotonic())
    if plan_made.blocks != plan_made.dense:
        loaded = prepare(loaded, config)
        size = plan_made.dense_estimates.bytes // plan_made.dense_estimates.parameters
        shrunk = loaded.architecture.with_blocks(plan_made.blocks)
        plan_made = dataclasses.replace(plan_made, estimates=shrunk.estimates(size))
    if loaded.note:
        plan_made = dataclasses.replace(plan_made, notes=(loaded.note, *plan_made.notes))
    directory.write(PLAN, plan_made)
    ranks.told(lambda: Message({"plan": to_dict(plan_made)}))
    key = {**fields_of(config, "load", "calibrate", "prune"), "source": loaded.source.fingerprint, "text": text.sha256}
    with progress.stage("prune"):
        for note in plan_made.notes:
            progress.note(note)
        # Sizes that were measured do not follow from the options; blocks of another plan are no part of this one.
        sizes = hashlib.sha256(repr(plan_made.blocks).encode()).hexdigest()[:12]
        identity = {**key, **numbers(config, loaded), "sizes": sizes}
        sink = DirectorySink(directory / WORK, loaded.architecture, identity, resume=True)
        if sink.finished():
            progress.note(f"going on after block {sink.finished()} of {len(plan_made.blocks)}")
        dense = loaded.architecture
        fresh = [loaded]  # blocks that were shrunk in place are read again before another try
        del loaded, weighing, planning  # which do not hold the first ones beside them

        def pruning(room: Room) -> PrunedModel:
            of = fresh.pop() if fresh else prepare(load_model(config, streamed=streamed), config)
            return prune_model(
                of, plan_made, calibration, config,
                curvature=curvature, sink=sink, ranks=ranks, room=room, progress=progress.update,
            )  # fmt: skip

        pruned = with_less(pruning, room, progress, config, again=ranks.size == 1)
    curvature = ()  # as large as many blocks
    with progress.stage("shrink"):
        checkpoint = _shrink(directory, pruned, dense, config, progress)
    weighed, allocating = (round(b - a, 2) for a, b in pairwise(spent))
    directory.write(PRUNE, PruneRecord(pruned.trace, text, checkpoint, weighed, allocating, pruned.logit_scale))
    directory.finish("prune", key, time.monotonic() - started)
    sink.discard()
    return checkpoint


def assist(config: RunConfig, ranks: Ranks) -> None:
    """The prune stage of a rank that is not the first: it reads the same model and text, is told the plan, and puts its
    part of the calibration set through the blocks. It writes nothing."""
    from slimexport.calibration import calibrate
    from slimexport.loading import load_model, resolve_device
    from slimexport.pruning import allocation as allocations
    from slimexport.pruning.memory import fitting
    from slimexport.pruning.stage import prepare, prune_model, save_dtype_of
    from slimexport.pruning.states import Keeper, Room
    from slimexport.stages.out_of_memory import with_less

    if ranks.told(Message).values["done"]:
        return
    loaded = load_model(config, streamed=block_by_block(config))
    device, streamed = resolve_device(config.device), loaded.files is not None
    shown = plan_stage(config, loaded.architecture, save_dtype_of(config, loaded))
    needs = fitting(shown, loaded.architecture, config, device, streamed=streamed, ranks=ranks.size)
    calibration = calibrate(config, loaded.tokenizer, loaded.model, lambda done, total, text: None)
    check_alike(ranks, _alike(config, loaded, calibration))

    def share(room: Room) -> None:
        if config.ratio and allocations.needs_costs(allocations.registry.get(config.resolved_allocation)):
            assist_planning(loaded, calibration, config, room, ranks)
        plan = from_dict(PruningPlan, ranks.told(Message).values["plan"], "the plan of rank 0")
        ready = prepare(loaded, config) if plan.blocks != plan.dense else loaded
        prune_model(ready, plan, calibration, config, ranks=ranks, room=room)

    silent = Progress(quiet=True)
    with_less(share, Room(Keeper(needs.place, device)), silent, config, again=False)


def _alike(config: RunConfig, loaded: LoadedModel, calibration: CalibrationSet) -> dict[str, str]:
    """What all ranks have to have the same of."""
    of_the_machine = ("model", "calibration", "device", "costs", "sizes")  # paths differ, what is there does not
    options = fields_of(config, "load", "calibrate", "prune")
    return {
        **versions("torch", "transformers"),
        "model": loaded.source.fingerprint,
        "text": calibration.source.sha256,
        **{f"option {name}": str(value) for name, value in options.items() if name not in of_the_machine},
    }


def block_by_block(config: RunConfig) -> bool:
    """Whether one block after the other will do: not where the model writes, has to be differentiated as a whole, or is
    given biases."""
    from slimexport.pruning.memory import why_whole

    return why_whole(config) is None


def _shrink(
    directory: RunDirectory, pruned: PrunedModel, dense: Architecture, config: RunConfig, progress: Progress
) -> ShrunkCheckpoint:
    """Writes the checkpoint aside, reloads it in a fresh process, and only then puts it into place."""
    from slimexport.checkpoint.card import model_card
    from slimexport.checkpoint.save import check_round_trip, checkpoint_artifact, save_checkpoint
    from slimexport.machine import memory
    from slimexport.pruning.memory import LIBRARIES_BYTES

    architecture = dense.with_blocks(pruned.plan.blocks)
    with staged_directory(directory / CHECKPOINT) as place:
        card = model_card(pruned.source, pruned.plan, pruned.calibration)
        files = save_checkpoint(
            pruned.model, pruned.tokenizer, architecture, pruned.plan, place, card=card, blocks=pruned.blocks
        )
        size = LIBRARIES_BYTES + sum(path.stat().st_size for path in place.glob("*.safetensors"))
        room = min(memory.available(), (config.memory_limit or memory.available()) - memory.resident())
        whole = not pruned.blocks.streamed or size <= room  # beside what this process has
        if not whole:
            progress.note("the fresh process reads the checkpoint block by block: it has not been loaded as a whole")
        difference = check_round_trip(pruned.model, place, config.seed, pruned.blocks, whole=whole)
        made = checkpoint_artifact(place, architecture, files, difference)
    return dataclasses.replace(made, path=CHECKPOINT)


def _check_same_options(directory: RunDirectory, config: RunConfig) -> None:
    """--resume is for the same run: names the first option of the pruning stages that differs."""
    before = make_config(directory.state["config"], str(directory / "run.json"))
    old, new = ({"model": c.model, **fields_of(c, "load", "calibrate", "prune")} for c in (before, config))
    for name, value in new.items():
        if old[name] != value:
            raise BadInputError(
                f"Cannot resume {directory.path}: it was started with {name} = {old[name]!r}, not {value!r}. "
                "Use the same options, or start over with --force."
            )


def _check_same_source(directory: RunDirectory, config: RunConfig) -> None:
    """A finished checkpoint counts only while the model and the text it was made from are those that are asked for."""
    from slimexport.loading import fingerprint, locate
    from slimexport.pruning.memory import calibrated_tokens

    since = f"since {directory.path} was made from it: --force starts over"
    if fingerprint(locate(config)) != directory.state["source"]["fingerprint"]:
        raise BadInputError(f"{config.model} has changed {since}.")
    text = directory.read(PRUNE, PruneRecord).calibration
    for part in text.parts or (text,):
        check_same_text(part, calibrated_tokens(config), since)


def _sizes(loaded: LoadedModel) -> str:
    estimates = loaded.architecture.estimates(1)
    return (
        f"{loaded.architecture.family.model_type}, {len(loaded.architecture.blocks)} blocks, "
        f"{estimates.parameters / 1e6:.1f} M parameters, stored as {loaded.source.stored_dtype}"
    )
