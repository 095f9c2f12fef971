"""The prune stage: a loaded model and a plan in, the same model with really smaller tensors out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from slimexport import __version__
from slimexport.artifacts import BlockTrace, CalibrationSet, PrunedModel, PruningPlan
from slimexport.errors import BadInputError
from slimexport.loading import LoadedModel, resolve_device
from slimexport.pruning.blocks import BlockSink, ModelBlocks, NullSink
from slimexport.pruning.criteria import registry as criteria
from slimexport.pruning.engine import prune_blocks
from slimexport.pruning.forward import Settings, first_states
from slimexport.pruning.shrink import apply_sizes

if TYPE_CHECKING:
    from slimexport.config import RunConfig


def save_dtype_of(config: RunConfig, loaded: LoadedModel) -> str:
    """Name of the precision the checkpoint is written in."""
    return loaded.source.stored_dtype if config.save_dtype == "auto" else config.save_dtype


def numbers(config: RunConfig, loaded: LoadedModel) -> dict[str, object]:
    """What else decides the last bits: the same bytes are promised for the same machine, libraries and precision."""
    device = resolve_device(config.device)
    stored = getattr(torch, save_dtype_of(config, loaded))
    return {
        "slimexport": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "compute dtype": str(_compute_dtype(config, device, stored)),
    }


def prune_model(
    loaded: LoadedModel,
    plan: PruningPlan,
    calibration: CalibrationSet,
    config: RunConfig,
    *,
    sink: BlockSink | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> PrunedModel:
    """Prunes `loaded.model` in place (its tensors become the smaller ones, in the precision they are saved in).

    With ratio 0 every tensor stays what it is, bit for bit, and the calibration set is not touched.
    """
    device = resolve_device(config.device)
    model = loaded.model
    stored = getattr(torch, save_dtype_of(config, loaded))
    for parameter in model.parameters():  # and not the buffers: rotary frequencies stay in float32
        parameter.data = parameter.data.to(stored)
        if not bool(torch.isfinite(parameter.data).all()):
            raise BadInputError(f"Weights of {loaded.source.name} overflow in {stored}: choose another --save-dtype.")
    compute = _compute_dtype(config, device, stored)
    _full_float32_matmul()
    trace: tuple[BlockTrace, ...] = ()
    if plan.blocks != plan.dense:
        settings = Settings(device, compute, config.group_size_start, config.group_size_end, config.damping)
        states, arguments = first_states(model, loaded.architecture, calibration.input_ids, settings)
        trace = prune_blocks(
            source=ModelBlocks(model, loaded.architecture),
            sink=sink or NullSink(),
            states=states,
            arguments=arguments,
            architecture=loaded.architecture,
            plan=plan,
            criterion=criteria.get(plan.criterion),
            settings=settings,
            progress=progress,
        )
        apply_sizes(model.config, loaded.architecture, plan.blocks)
    return PrunedModel(model, loaded.tokenizer, plan, trace, calibration.source, loaded.source)


def _compute_dtype(config: RunConfig, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """float32 on the CPU, where half precision is slow; the stored precision on CUDA; or what was asked for."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.float32 if device.type == "cpu" else stored


def _full_float32_matmul() -> None:
    """TF32 keeps ten bits of mantissa: too few for H, whose smallest eigenvalues decide."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
