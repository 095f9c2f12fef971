"""The prune stage: a loaded model and a plan in, the same model with really smaller tensors out; and before it, where
the allocation asks for them, the costs that the plan is made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slimexport import __version__
from slimexport.artifacts import BlockTrace, CalibrationSet, CostTable, ModelSource, PruningPlan, TextSource
from slimexport.errors import BadInputError
from slimexport.loading import LoadedModel, resolve_device
from slimexport.precisions import cast_parameters, parts_in_float32
from slimexport.pruning import allocation, readout
from slimexport.pruning.allocation import SearchSettings
from slimexport.pruning.biases import bias_fields, with_output_biases
from slimexport.pruning.blocks import BlockSink, BlockSource, ModelBlocks, NullSink, SharedSink
from slimexport.pruning.criteria import registry as criteria
from slimexport.pruning.curvature import BlockCurvature, measure_curvature
from slimexport.pruning.engine import HeldOut, prune_blocks
from slimexport.pruning.forward import BATCH_TOKENS, Settings, first_states
from slimexport.pruning.gradients import check_differentiable, collect_gradients, collect_low_rank
from slimexport.pruning.grid import COST_SEQUENCES, PROBE_LENGTH, centred
from slimexport.pruning.probe import output_logits, output_scores
from slimexport.pruning.sensitivity import measure_costs
from slimexport.pruning.shrink import apply_sizes
from slimexport.pruning.states import CPU, Room
from slimexport.pruning.supernet import Supernet, SupernetWriter, read_grids
from slimexport.ranks import ALONE, Ranks
from slimexport.streaming.blocks import StreamedBlocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slimexport.architectures.base import Architecture
    from slimexport.config import RunConfig


@dataclass(frozen=True)
class PrunedModel:
    """The shrunk model in memory (`model` really has the smaller tensors) and how it came about."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: PruningPlan
    trace: tuple[BlockTrace, ...]
    calibration: TextSource
    source: ModelSource
    logit_scale: float  # what the final norm was multiplied by
    blocks: BlockSource  # those of `model`, which may be on disk


def blocks_of(loaded: LoadedModel, stored: torch.dtype, device: torch.device = CPU) -> BlockSource:
    """The blocks of `loaded`, one after the other, in precision `stored` where they come from disk, to be computed with
    on `device`."""
    if loaded.files is None:
        return ModelBlocks(loaded.model, loaded.architecture)
    pinned = device.type == "cuda"
    return StreamedBlocks(
        loaded.model, loaded.architecture, loaded.files, stored, loaded.source.name, pinned=pinned
    )  # fmt: skip


def save_dtype_of(config: RunConfig, loaded: LoadedModel) -> str:
    """Name of the precision the checkpoint is written in."""
    return loaded.source.stored_dtype if config.save_dtype == "auto" else config.save_dtype


def wants_biases(config: RunConfig) -> bool:
    return config.bias_compensation != "off" and getattr(criteria.get(config.criterion), "compensates_bias", False)


def check_criterion(architecture: Architecture, config: RunConfig) -> None:
    """Raises BadInputError for a criterion that asks for what the family has not."""
    if wants_biases(config):
        bias_fields(architecture, required=config.bias_compensation == "on")


def prepare(loaded: LoadedModel, config: RunConfig) -> LoadedModel:
    """`loaded` with what the criterion needs of the model itself: room for its biases."""
    if not wants_biases(config):
        return loaded
    return with_output_biases(loaded, required=config.bias_compensation == "on")


def numbers(config: RunConfig, loaded: LoadedModel) -> dict[str, object]:
    """What else decides the last bits: the same bytes are promised for the same machine, libraries and precision."""
    device = resolve_device(config.device)
    stored = getattr(torch, save_dtype_of(config, loaded))
    return {
        "slimexport": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "compute dtype": str(compute_dtype(config, device, stored)),
    }


def prune_model(
    loaded: LoadedModel,
    plan: PruningPlan,
    calibration: CalibrationSet,
    config: RunConfig,
    *,
    curvature: Sequence[BlockCurvature] | None = None,
    sink: BlockSink | None = None,
    ranks: Ranks = ALONE,
    room: Room = Room(),
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> PrunedModel:
    """Prunes `loaded.model` in place (its tensors become the smaller ones, in the precision they are saved in).

    With ratio 0 every tensor stays what it is, bit for bit, and the calibration set is not touched. `curvature` is what
    `curvature_of` gives, None: it is measured here. Where the blocks of `loaded` are on disk, the finished ones are in
    the files of `sink`, which has to have some. `room`: where hidden states live.

    Of several `ranks`, which all have the same plan and calibration set, each takes its part of the latter; sink,
    curvature, trace and the pruned model count on the first one alone.
    """
    device = resolve_device(config.device)
    model = loaded.model
    stored = getattr(torch, save_dtype_of(config, loaded))
    blocks = blocks_of(loaded, stored, device)
    cast_parameters(model, stored)
    if not all(bool(torch.isfinite(p.data).all()) for p in model.parameters() if not p.is_meta):
        raise BadInputError(f"Weights of {loaded.source.name} overflow in {stored}: choose another --save-dtype.")
    _full_float32_matmul()
    trace: tuple[BlockTrace, ...] = ()
    scale = 1.0
    if plan.blocks != plan.dense:
        alone = settings_of(loaded.model, config, device, stored, room)
        settings = dataclasses.replace(alone, ranks=ranks)
        if loaded.files is not None and sink is None and ranks.rank == 0:
            raise ValueError("blocks that are not in memory need a sink")
        criterion = criteria.get(plan.criterion)
        gradients: Sequence[Mapping[str, torch.Tensor]] = ()
        if getattr(criterion, "needs_gradients", False) and ranks.rank == 0:
            where: dict[str, Any] = {"device": device, "dtype": settings.dtype}
            whole = model, loaded.architecture, calibration.input_ids
            rank = getattr(criterion, "gradient_rank", None)
            if rank is None:
                gradients = collect_gradients(*whole, **where)
            else:
                gradients = collect_low_rank(*whole, rank=rank, seed=config.seed, **where)
        if curvature is None and ranks.rank == 0:
            curvature = curvature_of(loaded, calibration, config, room)
        ids, norm = calibration.input_ids, _scalable_norm(loaded)
        aside = readout.held_out(*ids.shape) if settings.refit and norm else []
        used = [i for i in range(len(ids)) if i not in aside]
        states, arguments = first_states(model, loaded.architecture, ids[used], settings)
        unseen = _unseen(model, loaded.architecture, ids[aside], alone) if aside and ranks.rank == 0 else None
        trace = prune_blocks(
            source=blocks,
            sink=SharedSink(sink or NullSink(), ranks, loaded.architecture) if ranks.size > 1 else sink or NullSink(),
            states=states,
            arguments=arguments,
            architecture=loaded.architecture,
            plan=plan,
            criterion=criterion,
            settings=settings,
            gradients=gradients,
            curvature=curvature or (),
            held_out=unseen,
            progress=progress,
        )
        if unseen and norm:
            scale = _fitted_scale(model, loaded.architecture, unseen, device)
            offset = loaded.architecture.family.final_norm_offset
            readout.scale_logits(model.get_submodule(norm), scale, offset)
        apply_sizes(model.config, loaded.architecture, plan.blocks)
    return PrunedModel(model, loaded.tokenizer, plan, trace, calibration.source, loaded.source, scale, blocks)


def _scalable_norm(loaded: LoadedModel) -> str | None:
    """The final norm, where the logits grow with its weight: not where they are capped, or have a bias."""
    family = loaded.architecture.family
    capped = family.softcap_field and getattr(loaded.model.config, family.softcap_field, None)
    biased = getattr(loaded.model.get_output_embeddings(), "bias", None) is not None
    return None if capped or biased else family.final_norm


def _unseen(model: PreTrainedModel, architecture: Architecture, ids: torch.Tensor, settings: Settings) -> HeldOut:
    states, arguments = first_states(model, architecture, ids, settings)
    return HeldOut(states, settings.keep(states), arguments)


@torch.no_grad()
def _fitted_scale(model: PreTrainedModel, architecture: Architecture, unseen: HeldOut, device: torch.device) -> float:
    logits = output_logits(model, architecture, device)
    dense, shrunk = ([logits(batch) for batch in stream] for stream in (unseen.dense, unseen.shrunk))
    return readout.fit_scale(dense, shrunk)


def measure_model(
    loaded: LoadedModel,
    calibration: CalibrationSet,
    config: RunConfig,
    *,
    curvature: Sequence[BlockCurvature] | None = None,
    supernet: Path | None = None,
    room: Room = Room(),
    ranks: Ranks = ALONE,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> CostTable:
    """What each size of each block's heads and channels costs `loaded.model`, which is left as it is.

    `curvature` is what `curvature_of` gives, None: it is measured here.
    `supernet`: a directory for the matrices that a search puts plans together from, made in the same pass.
    Of several `ranks` each passes its part of the candidates on; all are given the table.
    """
    device = resolve_device(config.device)
    stored = getattr(torch, save_dtype_of(config, loaded))
    alone = settings_of(loaded.model, config, device, stored, room)
    _full_float32_matmul()
    model, architecture, ids = loaded.model, loaded.architecture, calibration.input_ids
    chosen = _probed(ids, config)
    known = _away_from(chosen, len(ids))
    states, arguments = first_states(model, architecture, ids[known], alone)
    probes, probe_arguments = first_states(model, architecture, _pieces(ids, chosen), alone, whole=True)
    identity = cost_identity(loaded.source.fingerprint, config, calibration.source.sha256)
    writer = None if supernet is None else SupernetWriter(supernet, stored)
    if curvature is None and ranks.rank == 0:
        curvature = curvature_of(loaded, calibration, config, room)
    table = measure_costs(
        source=blocks_of(loaded, stored, device),
        states=states,
        arguments=arguments,
        probes=probes[0],
        probe_arguments=lambda block: probe_arguments(block, 0),
        logits=output_logits(model, architecture, device),
        architecture=architecture,
        settings=dataclasses.replace(alone, ranks=ranks),
        round_to=config.round_to,
        identity=identity,
        curvature=curvature or (),
        keep=writer,
        progress=progress,
    )
    if writer is not None:
        writer.finish(identity)
    return table


def weighs_errors(config: RunConfig) -> bool:
    """Whether there are tokens to measure curvature on, and a criterion or an allocation that reads it."""
    weighs = getattr(criteria.get(config.criterion), "weighs_errors", False)
    measures = allocation.needs_costs(allocation.registry.get(config.resolved_allocation))
    return bool(config.resolved_curvature_tokens) and (weighs or measures)


def curvature_of(
    loaded: LoadedModel, calibration: CalibrationSet, config: RunConfig, room: Room = Room()
) -> Sequence[BlockCurvature]:
    """What `loaded.model`, which is dense, minds of errors in its blocks' outputs; nothing where that is not wanted.

    Raises BadInputError for a model that was made under `torch.inference_mode()`.
    """
    if not weighs_errors(config):
        return ()
    device = resolve_device(config.device)
    stored = getattr(torch, save_dtype_of(config, loaded))
    settings = settings_of(loaded.model, config, device, stored, room)
    _full_float32_matmul()
    model, architecture, ids = loaded.model, loaded.architecture, calibration.input_ids
    for name, parameter in model.named_parameters():
        check_differentiable(name, parameter, wanted=False)
    chosen = centred(len(ids), max(1, config.resolved_curvature_tokens // min(ids.shape[1], PROBE_LENGTH)))
    with torch.inference_mode(False):
        states, arguments = first_states(model, architecture, _pieces(ids, chosen), settings)
        return measure_curvature(
            source=blocks_of(loaded, stored, device),
            states=states,
            arguments=arguments,
            scores=output_scores(model, architecture, device, config.seed),
            architecture=architecture,
            settings=settings,
        )


def supernet_of(
    loaded: LoadedModel, calibration: CalibrationSet, config: RunConfig, supernet: Path, ranks: Ranks = ALONE
) -> Supernet:
    """What plans for `loaded.model` are tried with: the matrices that `measure_model` left in `supernet`, on the
    windows that costs are measured on."""
    device = resolve_device(config.device)
    stored = getattr(torch, save_dtype_of(config, loaded))
    settings = settings_of(loaded.model, config, device, stored)
    _full_float32_matmul()
    model, architecture, ids = loaded.model, loaded.architecture, calibration.input_ids
    pieces = _pieces(ids, _probed(ids, config))
    probes, arguments = first_states(model, architecture, pieces, settings, whole=True)
    return Supernet(
        supernet,
        source=blocks_of(loaded, stored, device),
        probes=probes[0],
        arguments=lambda block: arguments(block, 0),
        logits=output_logits(model, architecture, device),
        architecture=architecture,
        settings=dataclasses.replace(settings, ranks=ranks),
    )


def search_settings(
    loaded: LoadedModel,
    calibration: CalibrationSet,
    config: RunConfig,
    *,
    supernet: Path,
    state: Path | None = None,
    ranks: Ranks = ALONE,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> SearchSettings:
    """How plans for `loaded.model` are tried, by all `ranks`, of which this is the first."""
    identity = cost_identity(loaded.source.fingerprint, config, calibration.source.sha256)
    grids = read_grids(supernet, identity)
    if grids is None:
        raise BadInputError(f"{supernet} holds no supernet of this model, text and settings.")
    whole = supernet_of(loaded, calibration, config, supernet, ranks)
    return SearchSettings(
        evaluate=whole.evaluate,
        end=whole.end,
        grids=grids,
        seed=config.seed,
        seconds=config.search_seconds,
        evaluations=config.search_evaluations,
        state=state,
        identity={**identity, **numbers(config, loaded), "ratio": config.ratio},
        progress=progress,
    )


def _probed(ids: torch.Tensor, config: RunConfig) -> list[int]:
    """The calibration sequences whose output is compared with the dense model's."""
    return centred(len(ids), max(1, config.probe_tokens // min(ids.shape[1], PROBE_LENGTH)))


def _pieces(ids: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    """The beginnings of the chosen sequences: int64 [n, length] of [sequences, length]."""
    return ids[chosen, :PROBE_LENGTH]


def _away_from(chosen: list[int], available: int) -> list[int]:
    """At most COST_SEQUENCES of the other sequences (all of them the chosen ones: those), the farthest from the chosen:
    what stands beside a probe is of the same article, and cuts compensated on it would look cheaper than they are."""
    rest = [i for i in range(available) if i not in chosen] or chosen
    far = sorted(rest, key=lambda i: -min(abs(i - j) for j in chosen))
    return sorted(far[:COST_SEQUENCES])


def cost_identity(fingerprint: str, config: RunConfig, text: str | None) -> dict[str, str]:
    """What a cost table was measured on; without `text` (its sha256) as much as is known before it is read."""
    fields = (
        "calibration_tokens", "sequence_length", "probe_tokens", "seed", "damping", "round_to", "dtype", "save_dtype"
    )  # fmt: skip
    known = {
        "model": fingerprint,
        **{name: str(getattr(config, name)) for name in fields},
        "curvature_tokens": str(config.resolved_curvature_tokens),
        "slimexport": __version__,
    }
    return known if text is None else {**known, "text": text}


def settings_of(
    model: PreTrainedModel, config: RunConfig, device: torch.device, stored: torch.dtype, room: Room = Room()
) -> Settings:
    dtype = compute_dtype(config, device, stored)
    return Settings(
        device=device,
        dtype=dtype,
        in_float32=parts_in_float32(model, dtype),
        group_size_start=config.group_size_start,
        group_size_end=config.group_size_end,
        damping=config.damping,
        refit=config.resolved_refit,
        seed=config.seed,
        biases=config.bias_compensation != "off",
        keep=room.keep,
        batch_tokens=room.batch_tokens or BATCH_TOKENS[device.type],
    )


def compute_dtype(config: RunConfig, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """float32 on the CPU, where half precision is slow; the stored precision on CUDA; or what was asked for."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.float32 if device.type == "cpu" else stored


def _full_float32_matmul() -> None:
    """TF32 keeps ten bits of mantissa: too few for H, whose smallest eigenvalues decide."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
