"""The block-by-block loop (SlimGPT, algorithm 1): inputs that passed through the pruned blocks before, one block in
memory at a time, attention first, then the FFN on what the pruned attention gives.

Per block the calibration set goes through: up to o_proj (inputs of the heads); on with the pruned attention, whose
inputs were kept, up to down_proj (inputs of the channels); and once whole through the shrunk block, whose output is the
next block's input. With a re-fit, a second stream goes through the dense blocks in lock-step: what it holds after each
output matrix is what the pruned one is fitted toward.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from slimexport.architectures.base import CHANNELS, QUERY, Architecture, Kept
from slimexport.artifacts import BlockSizes, BlockTrace, PruningPlan
from slimexport.environment import peak_memory_bytes
from slimexport.pruning.blocks import BlockSink, BlockSource, HiddenStates, MemoryStates
from slimexport.pruning.criteria import Criterion, Site
from slimexport.pruning.forward import Arguments, Settings, inputs_of, known_attention, output, watch, working_copy
from slimexport.pruning.hessian import Moments, check_finite, solvable
from slimexport.pruning.obs import Selection, refit, removal_error
from slimexport.pruning.shrink import shrink_block

SINK = 8.0  # times the median size of the residual: above it a token is an attention sink


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
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> tuple[BlockTrace, ...]:
    """Shrinks every block of `source` in place, in order, and hands each to `sink` as soon as it is finished.

    Args:
        states: hidden states before block 0, per batch; overwritten by those before the last block.
        gradients: of every block's weights, by name, where the criterion needs them.
    """
    traces: list[BlockTrace] = []
    finished = sink.finished()
    dense = MemoryStates(states[batch] for batch in range(len(states))) if settings.refit else None
    for index in range(len(source)):
        home = source.load(index)
        clock = Stopwatch(settings.device)
        targets = None
        if dense is not None:
            with clock.on("forward"):
                targets = _dense_pass(index, home, dense, arguments, architecture, settings, index >= finished)
        if index < finished:
            trace = sink.restore(index, home)
        else:
            block = _Block(index, home, states, arguments, architecture, plan.blocks[index], criterion, settings, clock)
            block.targets = targets
            block.gradients = gradients[index] if gradients else {}
            with solvable(index):
                trace = block.prune()
        if index + 1 < len(source):
            work = working_copy(home, settings)
            for batch in range(len(states)):
                with clock.on("forward"):
                    states[batch] = output(work(states[batch], **arguments(index, batch)))
        if index >= finished:
            trace = dataclasses.replace(
                trace, seconds_forward=clock.seconds["forward"], peak_memory_bytes=_peak_memory(settings.device)
            )
            sink.save(index, home, trace)
        traces.append(trace)
        progress(index + 1, len(source), _describe(trace, index < finished))
    return tuple(traces)


@dataclass
class _Targets:
    """What the dense stream adds in this block, per batch, and what it was before."""

    before: list[torch.Tensor]
    attention: list[torch.Tensor]
    ffn: list[torch.Tensor]


def _dense_pass(
    index: int,
    home: nn.Module,
    dense: MemoryStates,
    arguments: Arguments,
    architecture: Architecture,
    settings: Settings,
    wanted: bool,
) -> _Targets | None:
    """Moves the dense stream through the block while it is still dense."""
    family, work = architecture.family, working_copy(home, settings)
    targets = _Targets(list(dense), [], [])
    for batch in range(len(dense)):
        seen = watch(work, (family.attention_output, family.ffn_output), dense[batch], arguments(index, batch))
        dense[batch] = seen.output
        if wanted:
            targets.attention.append(seen.outputs[family.attention_output])
            targets.ffn.append(seen.outputs[family.ffn_output])
    return targets if wanted else None


class _Block:
    """One block while it is pruned."""

    targets: _Targets | None = None
    gradients: Mapping[str, torch.Tensor] = {}

    def __init__(
        self,
        index: int,
        home: nn.Module,
        states: HiddenStates,
        arguments: Arguments,
        architecture: Architecture,
        keep: BlockSizes,
        criterion: Criterion,
        settings: Settings,
        clock: Stopwatch,
    ):
        self.index, self.home, self.states, self.keep = index, home, states, keep
        self.architecture, self.criterion, self.settings, self.clock = architecture, criterion, settings, clock
        self.family, self.dense = architecture.family, architecture.blocks[index]
        self._arguments = arguments
        self.kept = Kept.all(self.dense)
        self.work = working_copy(home, settings)
        self.damping = 0.0
        self.notes: list[str] = []

    def prune(self) -> BlockTrace:
        attention, head_errors = self._prune_heads()
        channel_errors = self._prune_channels(attention)
        return BlockTrace(
            block=self.index,
            query_heads=self.kept.query_heads,
            kv_groups=self.kept.kv_groups,
            channels=self.kept.channels,
            attention_error_before=head_errors[0],
            attention_error=head_errors[1],
            ffn_error_before=channel_errors[0],
            ffn_error=channel_errors[1],
            seconds_forward=0.0,  # the caller's, after the pass through the shrunk block
            seconds_hessian=self.clock.seconds["hessian"],
            seconds_selection=self.clock.seconds["selection"],
            damping=self.damping,
            peak_memory_bytes=0,  # the caller's too
            notes=tuple(self.notes),
        )

    def _prune_heads(self) -> tuple[list[torch.Tensor] | None, tuple[float, float]]:
        """The inputs of the pruned o_proj, per batch, and the errors before and after compensation."""
        whole = (self.keep.kv_groups, self.keep.heads_per_group) == (self.dense.kv_groups, self.dense.heads_per_group)
        if whole and self.targets is None:
            return None, (0.0, 0.0)
        name = self.family.attention_output
        moments = self._moments(self.dense.query_heads * self.architecture.head_dim)
        inputs: list[torch.Tensor] = []
        project = self.work.get_submodule(name)
        for batch in range(len(self.states)):
            with self.clock.on("forward"):
                inputs.append(inputs_of(self.work, name, self.states[batch], self._arguments(self.index, batch)))
            with self.clock.on("hessian"):
                missed = None
                if self.targets is not None:
                    wanted = self.targets.before[batch] + self.targets.attention[batch]
                    missed = _missed(wanted, self.states[batch] + project(inputs[batch]))
                moments.add(inputs[batch], missed)
        with self.clock.on("selection"):
            W = self._fitted(name, moments)
            site = self._site(name, W, moments, QUERY)
            if whole:
                selection = Selection(self.kept.query_heads, W, 0.0)
            else:
                selection, used = self.criterion.heads(site)
                self.damping = max(self.damping, used)
            groups = tuple(sorted({h // self.dense.heads_per_group for h in selection.kept}))
            self.kept = Kept(groups, selection.kept, self.kept.channels)
            columns = torch.tensor(self.architecture.axis_index(QUERY, self.kept), device=self.settings.device)
            errors = (0.0, 0.0) if whole else _errors(W, selection.W, columns, site.H)
            self._shrink(name, self.kept, selection, columns)
            for batch, found in enumerate(inputs):
                inputs[batch] = found[..., columns]
        return inputs, errors

    def _prune_channels(self, attention: list[torch.Tensor] | None) -> tuple[float, float]:
        whole = self.keep.channels == self.dense.channels
        if whole and self.targets is None:
            return 0.0, 0.0
        name = self.family.ffn_output
        moments = self._moments(self.dense.channels)
        project = self.work.get_submodule(self.family.attention_output)
        down = self.work.get_submodule(name)
        for batch in range(len(self.states)):
            with self.clock.on("forward"), known_attention(self.work, self.architecture, attention, batch):
                inputs = inputs_of(self.work, name, self.states[batch], self._arguments(self.index, batch))
            with self.clock.on("hessian"):
                missed = None
                if self.targets is not None:
                    assert attention is not None
                    wanted = self.targets.before[batch] + self.targets.attention[batch] + self.targets.ffn[batch]
                    missed = _missed(wanted, self.states[batch] + project(attention[batch]) + down(inputs))
                moments.add(inputs, missed)
        with self.clock.on("selection"):
            W = self._fitted(name, moments)
            site = self._site(name, W, moments, CHANNELS)
            if whole:
                selection = Selection(self.kept.channels, W, 0.0)
            else:
                selection, used = self.criterion.channels(site)
                self.damping = max(self.damping, used)
            columns = torch.tensor(selection.kept, device=self.settings.device)
            errors = (0.0, 0.0) if whole else _errors(W, selection.W, columns, site.H)
            # Attention was sliced already: its indices are the new ones.
            self._shrink(
                name, dataclasses.replace(Kept.all(self.kept.sizes), channels=selection.kept), selection, columns
            )
            self.kept = dataclasses.replace(self.kept, channels=selection.kept)
        return errors

    def _moments(self, size: int) -> Moments:
        return Moments(size, self.settings.device, None if self.targets is None else self.architecture.hidden)

    def _fitted(self, name: str, moments: Moments) -> torch.Tensor:
        """W [out, in] float64, fitted toward the dense stream where there is one."""
        W = self.home.get_parameter(f"{name}.weight").to(self.settings.device, torch.float64)
        H = moments.H()
        check_finite(H, self.index, self.settings.dtype)
        return W if self.targets is None else refit(W, H, W @ H + moments.C(), self.settings.refit)

    def _site(self, name: str, W: torch.Tensor, moments: Moments, axis: str) -> Site:
        H = moments.H()
        weight = f"{name}.weight"
        sources = {
            w.name: self.home.get_parameter(w.name).to(self.settings.device, torch.float64)
            for w in self.architecture.block_weights()
            if w.name != weight and w.axes[0] in _SOURCES[axis]
        }
        gradients = {
            key: value.to(self.settings.device, torch.float64)
            for key, value in self.gradients.items()
            if key == weight or key in sources
        }
        settings = self.settings
        return Site(
            W=W, H=H, mean=moments.mean(), dense=self.dense, keep=self.keep, head_dim=self.architecture.head_dim,
            group_size_start=settings.group_size_start, group_size_end=settings.group_size_end,
            damping=settings.damping, name=weight, block=self.index, seed=settings.seed, sources=sources,
            gradients=gradients,
        )  # fmt: skip

    def _shrink(self, name: str, kept: Kept, selection: Selection, columns: torch.Tensor) -> None:
        tensors = {f"{name}.weight": selection.W[:, columns]}
        bias = f"{name}.bias"
        if selection.bias is not None and self.settings.biases:
            if any(w.name == bias for w in self.architecture.block_weights()):
                old = self.home.get_parameter(bias).to(self.settings.device, torch.float64)
                tensors[bias] = old + selection.bias
            else:
                self.notes.append(f"{name} has no bias: what it would have compensated is lost")
        shrink_block(self.home, self.architecture, kept, tensors)
        self.work = working_copy(self.home, self.settings)


_SOURCES = {QUERY: (QUERY, "key_value"), CHANNELS: (CHANNELS,)}  # axes whose rows make the inputs of an output matrix


def _missed(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """What the pruned stream lacks to be the dense one, [sequences, length, hidden]; nothing at attention sinks.

    The residual of a first token is a hundred times that of the others in many models: its error would be all that
    the least squares see. With nothing to mend there, they leave what W gives as it is.
    """
    sizes = torch.stack([wanted, found]).float().square().mean(-1).amax(0).sqrt()
    return (wanted - found).masked_fill((sizes > SINK * sizes.median()).unsqueeze(-1), 0.0)


def _errors(W: torch.Tensor, changed: torch.Tensor, columns: torch.Tensor, H: torch.Tensor) -> tuple[float, float]:
    """Relative output error of plain removal and of removal with compensation."""
    plain = torch.zeros_like(W)
    plain[:, columns] = W[:, columns]
    return removal_error(W, plain, H), removal_error(W, changed, H)


def _peak_memory(device: torch.device) -> int:
    """Bytes: peak of the CUDA allocator, or of this process's resident memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()


def _describe(trace: BlockTrace, restored: bool) -> str:
    return (
        f"heads {len(trace.query_heads)}, channels {len(trace.channels)}, "
        f"error {trace.attention_error:.3f} / {trace.ffn_error:.3f}, "
        f"memory {trace.peak_memory_bytes / 1e9:.1f} GB" + (" (resumed)" if restored else "")
    )
