"""The block-by-block loop (SlimGPT, algorithm 1): inputs that passed through the pruned blocks before, one block in
memory at a time, attention first, then the FFN on what the pruned attention gives.

Per block the calibration set goes through: up to o_proj (inputs of the heads); on with the pruned attention, whose
inputs were kept, up to down_proj (inputs of the channels); and once whole through the shrunk block, whose output is the
next block's input. With a re-fit, a second stream goes through the dense blocks in lock-step: what it holds after each
output matrix is what the pruned one is fitted toward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from slimexport.architectures.base import Architecture
from slimexport.artifacts import BlockTrace, PruningPlan
from slimexport.environment import peak_memory_bytes
from slimexport.pruning.block import Block
from slimexport.pruning.blocks import BlockSink, BlockSource
from slimexport.pruning.clock import Stopwatch
from slimexport.pruning.criteria import Criterion
from slimexport.pruning.curvature import BlockCurvature
from slimexport.pruning.forward import Arguments, Settings, advance, watch, working_copy
from slimexport.pruning.hessian import solvable
from slimexport.pruning.states import HiddenStates
from slimexport.pruning.targets import Targets


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Sequences that nothing is fitted to, on their way through the dense blocks and through the shrunk ones: hidden
    states before block 0; afterwards, those after the last block."""

    dense: HiddenStates
    shrunk: HiddenStates
    arguments: Arguments


@torch.no_grad()
def prune_blocks(
    *,
    source: BlockSource,
    sink: BlockSink,
    states: HiddenStates,
    arguments: Arguments,
    architecture: Architecture,
    plan: PruningPlan,
    criterion: Criterion,
    settings: Settings,
    gradients: Sequence[Mapping[str, torch.Tensor]] = (),
    curvature: Sequence[BlockCurvature] = (),
    held_out: HeldOut | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> tuple[BlockTrace, ...]:
    """Shrinks every block of `source` in place, in order, and hands each to `sink` as soon as it is finished.

    Args:
        states: hidden states before block 0, per batch; overwritten by those before the last block.
        gradients: of every block's weights, by name, where the criterion needs them.
        curvature: of every block's outputs, by the name of the matrix, where errors are to be weighted by it.
        held_out: goes along, through the last block too.
    """
    traces: list[BlockTrace] = []
    finished = sink.finished()
    dense = settings.keep(states) if settings.refit else None
    for index in range(len(source)):
        home = source.load(index)
        clock = Stopwatch(settings.device)
        targets = None
        if held_out is not None:
            with clock.on("forward"):
                advance(held_out.dense, index, working_copy(home, settings), held_out.arguments)
        if dense is not None:
            with clock.on("forward"):
                targets = _dense_pass(
                    index, home, dense, arguments, architecture.by_block[index], settings, index >= finished
                )
        if index < finished:
            trace = sink.restore(index, home)
        else:
            block = Block(
                index, home, states, arguments, architecture.by_block[index], plan.blocks[index], criterion, settings,
                clock,
                targets=targets,
                gradients=gradients[index] if gradients else {},
                curvature=curvature[index] if curvature else {},
            )  # fmt: skip
            with solvable(index):
                trace = block.prune()
            del block, targets  # gigabytes on a large model, and the next block makes its own
        with clock.on("forward"):
            work = working_copy(home, settings)
            if index + 1 < len(source):
                advance(states, index, work, arguments)
            if held_out is not None:
                advance(held_out.shrunk, index, work, held_out.arguments)
        if index >= finished:
            trace = dataclasses.replace(
                trace, seconds_forward=clock.seconds["forward"], peak_memory_bytes=_peak_memory(settings.device)
            )
            sink.save(index, home, trace)
        source.release(index, sink.file(index))
        traces.append(trace)
        progress(index + 1, len(source), _describe(trace, index < finished))
    return tuple(traces)


def _dense_pass(
    index: int,
    home: nn.Module,
    dense: HiddenStates,
    arguments: Arguments,
    architecture: Architecture,
    settings: Settings,
    wanted: bool,
) -> Targets | None:
    """Moves the dense stream through the block while it is still dense. What a block without heads does in their place
    is not known apart from the rest: there is nothing to fit its channels toward."""
    family, work = architecture.family, working_copy(home, settings)
    wanted &= architecture.has_heads
    before = settings.keep(dense if wanted else ())
    none = (settings.keep(), settings.keep())
    targets = Targets(before, *none, architecture.residual_multiplier, family.outputs_normed)
    for batch in range(len(dense)):
        seen = watch(work, architecture.outputs, dense[batch], arguments(index, batch))
        dense[batch] = seen.output
        if wanted:
            targets.attention.append(seen.outputs[family.attention_output])
            if architecture.has_channels:
                targets.ffn.append(seen.outputs[family.ffn_output].view_as(seen.output))  # OPT flattens it
    return targets if wanted else None


def _peak_memory(device: torch.device) -> int:
    """Bytes: peak of the CUDA allocator, or of this process's resident memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()


def _describe(trace: BlockTrace, restored: bool) -> str:
    return (
        f"heads {len(trace.query_heads)}, channels {len(trace.channels)}, "
        f"error {trace.attention_error:.3f} / {trace.ffn_error:.3f}, "
        f"memory {trace.peak_memory_bytes / 1e9:.1f} GB" + (" (resumed)" if restored else "")
    )
