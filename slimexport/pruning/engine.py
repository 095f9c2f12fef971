"""The block-by-block loop (SlimGPT, algorithm 1): inputs that passed through the pruned blocks before, one block in
memory at a time, attention first, then the FFN on what the pruned attention gives.

Per block the calibration set goes through: up to o_proj (inputs of the heads); on with the pruned attention, whose
inputs were kept, up to down_proj (inputs of the channels); and once whole through the shrunk block, whose output is the
next block's input.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slimexport.architectures.base import QUERY, Architecture, Kept
from slimexport.artifacts import BlockSizes, BlockTrace, PruningPlan
from slimexport.environment import peak_memory_bytes
from slimexport.errors import BadInputError
from slimexport.pruning.blocks import BlockSink, BlockSource, HiddenStates, MemoryStates
from slimexport.pruning.criteria import Criterion, Site
from slimexport.pruning.hessian import Hessian
from slimexport.pruning.obs import NotPositiveDefiniteError, removal_error
from slimexport.pruning.shrink import shrink_block

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}  # per forward call: enough to keep the matrix units busy


@dataclass(frozen=True)
class Settings:
    """What the loop needs of RunConfig."""

    device: torch.device
    dtype: torch.dtype  # of the forward passes
    group_size_start: int
    group_size_end: int
    damping: float


@dataclass
class Stopwatch:
    """Seconds by what they were spent on; waits for the device, so that CUDA time lands where it belongs."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "hessian": 0.0, "selection": 0.0})

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[what] += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Reached(Exception):
    """Raised by a hook to leave a block as soon as the wanted inputs are there."""


@torch.no_grad()
def prune_blocks(
    *,
    source: BlockSource,
    sink: BlockSink,
    states: HiddenStates,
    arguments: Callable[[int, int], dict[str, Any]],
    architecture: Architecture,
    plan: PruningPlan,
    criterion: Criterion,
    settings: Settings,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> tuple[BlockTrace, ...]:
    """Shrinks every block of `source` in place, in order, and hands each to `sink` as soon as it is finished.

    Args:
        states: hidden states before block 0, per batch; overwritten by those before the last block.
        arguments: (block, batch) -> keyword arguments of that block's forward (mask, position embeddings, ...).
    """
    traces: list[BlockTrace] = []
    finished = sink.finished()
    for index in range(len(source)):
        home = source.load(index)
        if index < finished:
            trace = sink.restore(index, home)
        else:
            try:
                trace = _prune_block(
                    index, home, states, arguments, architecture, plan.blocks[index], criterion, settings
                )
            except (NotPositiveDefiniteError, torch.linalg.LinAlgError) as error:
                raise BadInputError(
                    f"The inputs of block {index} are too few or too alike to prune by ({error}): "
                    "give more --calibration-tokens or a larger --damping."
                ) from error
        watch = Stopwatch(settings.device)
        if index + 1 < len(source):
            work = _working_copy(home, settings)
            for batch in range(len(states)):
                with watch.on("forward"):
                    states[batch] = _output(work(states[batch], **arguments(index, batch)))
        if index >= finished:
            spent = trace.seconds_forward + watch.seconds["forward"]
            trace = dataclasses.replace(trace, seconds_forward=spent, peak_memory_bytes=_peak_memory(settings.device))
            sink.save(index, home, trace)
        traces.append(trace)
        progress(index + 1, len(source), _describe(trace, index < finished))
    return tuple(traces)


def _prune_block(
    index: int,
    home: nn.Module,
    states: HiddenStates,
    arguments: Callable[[int, int], dict[str, Any]],
    architecture: Architecture,
    keep: BlockSizes,
    criterion: Criterion,
    settings: Settings,
) -> BlockTrace:
    family, dense = architecture.family, architecture.blocks[index]
    watch = Stopwatch(settings.device)
    kept = Kept.all(dense)

    def site(W: torch.Tensor, H: torch.Tensor) -> Site:
        if not bool(torch.isfinite(H).all()):
            raise BadInputError(
                f"The activations of block {index} overflow in {str(settings.dtype).removeprefix('torch.')}; "
                "use --dtype float32 (or bfloat16)."
            )
        return Site(
            W,
            H,
            torch.zeros_like(H[0]),
            dense,
            keep,
            architecture.head_dim,
            settings.group_size_start,
            settings.group_size_end,
            settings.damping,
        )

    head_errors = channel_errors = (0.0, 0.0)
    damping = 0.0
    attention_inputs: MemoryStates | None = None
    work = _working_copy(home, settings)

    if (keep.kv_groups, keep.heads_per_group) != (dense.kv_groups, dense.heads_per_group):
        attention_inputs = MemoryStates()
        H = Hessian(dense.query_heads * architecture.head_dim, settings.device)
        for batch in range(len(states)):
            with watch.on("forward"):
                inputs = _inputs_of(work, family.attention_output, states[batch], arguments(index, batch))
            with watch.on("hessian"):
                H.add(inputs)
            attention_inputs.append(inputs)
        with watch.on("selection"):
            name = f"{family.attention_output}.weight"
            W = home.get_parameter(name).to(settings.device, torch.float64)
            mean = H.mean()
            selection, damping = criterion.heads(site(W, mean))
            groups = tuple(sorted({h // dense.heads_per_group for h in selection.kept}))
            kept = Kept(groups, selection.kept, kept.channels)
            columns = torch.tensor(architecture.axis_index(QUERY, kept), device=settings.device)
            head_errors = _errors(W, selection.W, columns, mean)
            shrink_block(home, architecture, kept, {name: selection.W[:, columns]})
            work = _working_copy(home, settings)
            for batch, inputs in enumerate(attention_inputs):
                attention_inputs[batch] = inputs[..., columns]

    if keep.channels != dense.channels:
        H = Hessian(dense.channels, settings.device)
        for batch in range(len(states)):
            with watch.on("forward"), _known_attention(work, architecture, attention_inputs, batch):
                inputs = _inputs_of(work, family.ffn_output, states[batch], arguments(index, batch))
            with watch.on("hessian"):
                H.add(inputs)
        with watch.on("selection"):
            name = f"{family.ffn_output}.weight"
            W = home.get_parameter(name).to(settings.device, torch.float64)
            mean = H.mean()
            selection, used = criterion.channels(site(W, mean))
            damping = max(damping, used)
            now = Kept.all(kept.sizes)  # attention was sliced already: its indices are the new ones
            columns = torch.tensor(selection.kept, device=settings.device)
            channel_errors = _errors(W, selection.W, columns, mean)
            now = dataclasses.replace(now, channels=selection.kept)
            shrink_block(home, architecture, now, {name: selection.W[:, columns]})
            kept = dataclasses.replace(kept, channels=selection.kept)

    return BlockTrace(
        block=index,
        query_heads=kept.query_heads,
        kv_groups=kept.kv_groups,
        channels=kept.channels,
        attention_error_before=head_errors[0],
        attention_error=head_errors[1],
        ffn_error_before=channel_errors[0],
        ffn_error=channel_errors[1],
        seconds_forward=watch.seconds["forward"],
        seconds_hessian=watch.seconds["hessian"],
        seconds_selection=watch.seconds["selection"],
        damping=damping,
        peak_memory_bytes=0,  # the caller's, after the pass through the shrunk block
    )


def _errors(W: torch.Tensor, changed: torch.Tensor, columns: torch.Tensor, H: torch.Tensor) -> tuple[float, float]:
    """Relative output error of plain removal and of removal with compensation."""
    plain = torch.zeros_like(W)
    plain[:, columns] = W[:, columns]
    return removal_error(W, plain, H), removal_error(W, changed, H)


def _working_copy(home: nn.Module, settings: Settings) -> nn.Module:
    """The block in compute precision on the compute device; the block itself where it is that already."""
    parameter = next(home.parameters())
    if parameter.dtype == settings.dtype and parameter.device == settings.device:
        return home
    return copy.deepcopy(home).to(device=settings.device, dtype=settings.dtype)


def _output(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def _inputs_of(block: nn.Module, name: str, states: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """What module `name` of `block` is given for `states`; the forward pass ends there."""
    found: list[torch.Tensor] = []

    def reached(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found.append(args[0])
        raise _Reached

    handle = block.get_submodule(name).register_forward_pre_hook(reached)
    try:
        block(states, **arguments)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise RuntimeError(f"module {name} was never called")


@contextmanager
def _known_attention(
    block: nn.Module, architecture: Architecture, inputs: list[torch.Tensor] | None, batch: int
) -> Iterator[None]:
    """Within it, the attention of `block` is o_proj on inputs already known: heads do not see each other, so removing
    some leaves the others' outputs as they were, and softmax(QK)V need not be computed a second time."""
    if inputs is None:
        yield
        return
    attention = block.get_submodule(architecture.family.attention)
    output = block.get_submodule(architecture.family.attention_output)
    attention.forward = lambda *args, **kwargs: (output(inputs[batch]), None)
    try:
        yield
    finally:
        del attention.forward


def first_states(
    model: PreTrainedModel, architecture: Architecture, input_ids: torch.Tensor, settings: Settings
) -> tuple[MemoryStates, Callable[[int, int], dict[str, Any]]]:
    """Hidden states before block 0, and what each block is called with.

    The decoder runs with its blocks replaced by recorders: embedding, masks and rotary tables come from the model's own
    code, whatever the family does there, and no block computes anything.

    Args:
        input_ids: int64 [sequences, length], no padding.
    """
    decoder = model.get_submodule(architecture.family.decoder)
    blocks = list(model.get_submodule(architecture.family.blocks))
    embed = model.get_input_embeddings()
    size = max(1, BATCH_TOKENS[settings.device.type] // input_ids.shape[1])
    states = MemoryStates()
    recorded: dict[int, dict[int, dict[str, Any]]] = {}  # batch size -> block -> arguments
    sizes: list[int] = []

    def recorder(index: int, seen: dict[int, dict[str, Any]]) -> Callable[..., torch.Tensor]:
        def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            if index == 0:
                states.append(hidden_states.to(settings.device))
            seen[index] = {**_to_device(kwargs, settings.device), "past_key_values": None, "use_cache": False}
            return hidden_states

        return forward

    with torch.no_grad():
        for ids in input_ids.split(size):
            sizes.append(len(ids))
            seen = recorded[len(ids)] = {}  # no padding: the same for every batch of this size
            for i, block in enumerate(blocks):
                block.forward = recorder(i, seen)
            try:
                decoder(inputs_embeds=embed(ids.to(embed.weight.device)).to(settings.dtype), use_cache=False)
            finally:
                for block in blocks:
                    del block.forward
    return states, lambda index, batch: recorded[sizes[batch]][index]


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _to_device(v, device) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to_device(v, device) for v in value)
    return value


def _peak_memory(device: torch.device) -> int:
    """Bytes: peak of the CUDA allocator, or of this process's resident memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()


def _describe(trace: BlockTrace, restored: bool) -> str:
    return (
        f"heads {len(trace.query_heads)}, channels {len(trace.channels)}, "
        f"error {trace.attention_error:.3f} / {trace.ffn_error:.3f}, "
        f"memory {trace.peak_memory_bytes / 1e9:.1f} GB" + (" (resumed)" if restored else "")
    )
