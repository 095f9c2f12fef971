"""Trains the shrunk model toward the dense one: from `checkpoint/` to `recovered/`, in the same shape."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from slimexport.artifacts import (
    ModelSource,
    PruningPlan,
    Recovery,
    ShrunkCheckpoint,
    from_dict,
    remove,
    staged_directory,
    to_dict,
)
from slimexport.config import RunConfig
from slimexport.errors import BadInputError, first_sentence
from slimexport.precisions import cast_parameters
from slimexport.progress import Progress
from slimexport.ranks import ALONE, Message, Ranks, check_alike, shared, summed, versions
from slimexport.run_directory import (
    CHECKPOINT,
    PLAN,
    PRUNE,
    RECOVER,
    RECOVERED,
    TRAINING,
    WORK,
    PruneRecord,
    RunDirectory,
)
from slimexport.stages.inputs import ANEW, check_files, check_same_text, dense_model, fields_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from slimexport.architectures.base import Architecture
    from slimexport.loading import LoadedModel
    from slimexport.recovery.domains import Domain
    from slimexport.recovery.methods import Method
    from slimexport.recovery.training import Recipe, Training

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")  # that all ranks need the same versions of
TOGETHER = {"cpu": 1024, "cuda": 8192}  # tokens in one forward pass


def recover_stage(
    directory: RunDirectory,
    config: RunConfig,
    progress: Progress,
    *,
    force: bool = False,
    resume: bool = False,
    ranks: Ranks = ALONE,
) -> Recovery:
    """`force` trains again what was trained, and takes text that overlaps the evaluation text. `ranks`: this is the
    first of them; the others `assist`."""
    import torch

    from slimexport.calibration import check_context, evaluation_ids
    from slimexport.checkpoint import load
    from slimexport.recovery import optimisers, texts
    from slimexport.recovery.chat import Chat, warning
    from slimexport.recovery.domains import READ_TOKENS, read_domains
    from slimexport.recovery.methods import registry as methods
    from slimexport.recovery.state import STATE, TrainingState

    if not directory.done("prune"):
        raise BadInputError(f"{directory.path} holds no finished checkpoint; run with --resume to finish it.")
    key = {"prune": directory.key("prune"), **fields_of(config, "recover"), "seed": config.seed}
    place = directory / WORK / TRAINING
    if directory.done("recover"):
        remove(directory / WORK)  # left where it was killed with nothing else to do
    if directory.done("recover", key) and not force:
        made = directory.read(RECOVER, Recovery)
        again = f"since the model was trained on it: slimexport recover {directory.path} --force trains again"
        for part in made.texts:
            check_same_text(part, READ_TOKENS, again)
        ranks.told(lambda: Message({"done": True}))
        return made
    if (place / STATE).is_file() and not (force or resume):
        raise BadInputError(
            f"{directory.path} holds a training that was interrupted: --resume goes on with it, --force starts over."
        )
    method = methods.get(config.recover)
    optimisers.check(config.recover_optimizer)
    pruned = directory.read(PRUNE, PruneRecord)
    check_files(directory / CHECKPOINT, pruned.checkpoint.files, advice=ANEW)
    started = time.monotonic()
    with progress.stage("recover"):
        fingerprint = directory.state["source"]["fingerprint"]
        teacher = dense_model(config, fingerprint, advice=ANEW)
        plan = directory.read(PLAN, PruningPlan)
        architecture = teacher.architecture.with_blocks(plan.blocks)
        method.check(architecture)
        check_context(teacher.model, config.recover_length, "--recover-length")
        student, tokenizer = load(directory / CHECKPOINT)
        stored = student.dtype
        written, overlaps = texts.kept(place, key) if resume else ([], False)
        domains, notes = read_domains(
            config.recover_text, tokenizer, teacher.model, config.recover_length, config.seed, progress.update, written
        )
        evaluation = evaluation_ids(config, tokenizer, None)
        overlaps = texts.check_apart(domains, evaluation, progress.note if force or overlaps else None)
        for note in notes:
            progress.note(note)
        if ranks.size > 1:
            options = config.model_dump(mode="json")
            said = {"done": False, "config": options, "fingerprint": fingerprint, "plan": to_dict(plan)}
            ranks.told(lambda: Message(said))
            check_alike(ranks, versions(*PACKAGES))
            _shared_checkpoint(ranks, directory / CHECKPOINT, pruned.checkpoint.files, directory / WORK)
            _shared_domains(ranks, domains)
            progress.note(f"{ranks.size} ranks share every step")
        training = training_of(config, student, teacher, architecture, domains, progress, ranks)
        identity = {
            **key,
            "checkpoint": dict(pruned.checkpoint.files),
            "texts": {d.name: d.part.sha256 for d in domains},
        }
        state = TrainingState(place, identity)
        if resume:
            state.numbers()  # of another training it is not
        # What the user could have got wrong has been looked at.
        directory.begin("recover")
        remove(directory / RECOVERED)  # of another recovery, if any: it is not to pass for this one
        if not resume:
            remove(place)
        texts.keep(place, key, domains, overlaps)
        with roomy(training.recipe):
            chat = Chat(teacher.model, tokenizer)
            ended = chat.ended(training.student)
            trained = training.run(state)
            answers = chat.check(ended, chat.ended(training.student))
        settings = {
            **fields_of(config, "recover"),
            "recover_text_share": training.recipe.text_share,
            "autocast": str(training.recipe.autocast).removeprefix("torch."),
            "apart_from": texts.looked_at(evaluation),
        }
        made = Recovery(
            config.recover, settings, tuple(d.part for d in domains), trained.points, trained.best,
            trained.steps, trained.tokens, round(trained.seconds, 1), trained.stopped, None, (*notes, *trained.notes),
            answers,
        )  # fmt: skip
        finished = method.finish(training.student)
        cast_parameters(finished, stored)
        before, after = (trained.points[at].judged for at in (0, trained.best))
        if trained.best and (stored != torch.float32 or config.recover == "lora"):
            after = training.judged(finished)  # merged, and rounded to what is stored
        if after < before:
            if answers is not None and (said_of_it := warning(answers)):
                progress.note(said_of_it)
                made = dataclasses.replace(made, notes=(*made.notes, said_of_it))
            finished = finished.to("cpu")
            made = dataclasses.replace(made, checkpoint=_save(directory, finished, teacher, architecture, made, config))
        else:
            answers = answers and dataclasses.replace(answers, recovered=answers.pruned)
            made = dataclasses.replace(made, best=0, chat=answers)
            progress.note("training made it no better: the pruned model is kept as it is")
    directory.write(RECOVER, made)
    directory.save_config(fields_of(config, "recover"))
    directory.finish("recover", key, time.monotonic() - started)
    remove(directory / WORK)
    return made


def assist(ranks: Ranks, model: str | None = None) -> None:
    """The recover stage of a rank that is not the first: it loads the same dense model (`model`, or from where the
    first one has it), is told all else, and takes its part of every step. It writes nothing."""
    from slimexport.checkpoint import load

    said = ranks.told(Message).values
    if said["done"]:
        return
    config = RunConfig.model_validate(said["config"] | ({"model": model} if model else {}))
    teacher = dense_model(config, said["fingerprint"], advice="all ranks need the same one")
    check_alike(ranks, versions(*PACKAGES))
    plan = from_dict(PruningPlan, said["plan"], "the plan of rank 0")
    architecture = teacher.architecture.with_blocks(plan.blocks)
    with tempfile.TemporaryDirectory() as place:
        student, _ = load(_shared_checkpoint(ranks, None, {}, Path(place)))
        domains = _shared_domains(ranks, ())
        training_of(config, student, teacher, architecture, domains, Progress(quiet=True), ranks).run(None)


def _shared_checkpoint(ranks: Ranks, path: Path | None, files: Mapping[str, str], aside: Path) -> Path:
    """Where this rank finds the first one's checkpoint: at the same path where all can read it there, otherwise in
    `aside`, where it is sent to."""
    said = ranks.told(lambda: Message({"path": str(path and path.resolve()), "files": dict(files)})).values
    there = Path(said["path"])
    try:
        check_files(there, said["files"], advice=ANEW)
        found = True
    except BadInputError:
        found = False
    if not summed(ranks, float(not found)):
        return there
    return shared(ranks, path, aside)


def _shared_domains(ranks: Ranks, domains: Sequence[Domain]) -> list[Domain]:
    """Those of the first rank."""
    from slimexport.recovery.domains import packed, unpacked

    def tell() -> Message:
        named, windows = packed(domains)
        return Message({"domains": named}, windows)

    said = ranks.told(tell)
    return unpacked(said.values["domains"], said.tensors)


def training_of(
    config: RunConfig,
    student: PreTrainedModel,
    teacher: LoadedModel,
    architecture: Architecture,
    domains: Sequence[Domain],
    progress: Progress,
    ranks: Ranks,
) -> Training:
    """All that `config` says of it, on its device, ready to run. The teacher's model is put into the precision of the
    forward passes."""
    import torch

    from slimexport.loading import resolve_device
    from slimexport.recovery.memory import fitting
    from slimexport.recovery.methods import registry as methods

    device, method = resolve_device(config.device), methods.get(config.recover)
    recipe = recipe_of(config, device, method, architecture)
    model = method.prepare(student.float(), architecture, config)
    recipe = fitting(model, teacher.model, architecture, recipe, config, device, one_by_one=method.one_by_one)
    cast_parameters(teacher.model.requires_grad_(False), recipe.autocast or torch.float32)
    with roomy(recipe):
        teacher.model.to(device)
        model = model.to(device)
    made = method.training(architecture)
    return made(model, teacher.model, domains, recipe, progress, ranks)


@contextmanager
def roomy(recipe: Recipe) -> Iterator[None]:
    """Within it, a device that has no room for both models is bad input; a batch that is too large is made smaller
    where it is put through."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BadInputError(
            f"The device ran out of memory with both models on it ({first_sentence(error)}): {recipe.lighter} needs "
            "less."
        ) from error


def recipe_of(config: RunConfig, device: torch.device, method: Method, architecture: Architecture) -> Recipe:
    from slimexport.machine.precision import fast_bfloat16
    from slimexport.recovery.budget import Budget
    from slimexport.recovery.memory import lighter
    from slimexport.recovery.training import Recipe

    return Recipe(
        budget=Budget.parse(config.recover_budget),
        learning_rate=config.recover_learning_rate or method.learning_rate,
        sequences=config.recover_sequences,
        together=min(config.recover_sequences, max(1, TOGETHER[device.type] // config.recover_length)),
        text_share=0.0 if method.one_by_one else config.recover_text_share,  # what it is judged by as well
        temperature=config.recover_temperature,
        hidden_weight=config.recover_hidden_weight,
        optimiser=config.recover_optimizer,
        autocast=fast_bfloat16(device),
        seed=config.seed,
        lighter=lighter(config, architecture),
    )


def _save(
    directory: RunDirectory,
    student: PreTrainedModel,
    teacher: LoadedModel,
    architecture: Architecture,
    how: Recovery,
    config: RunConfig,
) -> ShrunkCheckpoint:
    """Writes the checkpoint aside, reloads it in a fresh process, and only then puts it into place."""
    from slimexport.checkpoint.card import model_card
    from slimexport.checkpoint.save import check_round_trip, checkpoint_artifact, save_checkpoint

    plan, pruned = directory.read(PLAN, PruningPlan), directory.read(PRUNE, PruneRecord)
    source = from_dict(ModelSource, directory.state["source"], "run.json")
    with staged_directory(directory / RECOVERED) as place:
        card = model_card(source, plan, pruned.calibration, recovery=how)
        files = save_checkpoint(student, teacher.tokenizer, architecture, plan, place, card=card)
        difference = check_round_trip(student, place, config.seed)
        made = checkpoint_artifact(place, architecture, files, difference)
    return dataclasses.replace(made, path=RECOVERED)
