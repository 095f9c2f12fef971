"""What each size of each block's heads and channels costs the model: KL of its output, the rest being dense.

Per block: H of its dense inputs, the order in which the criterion's mathematics removes heads and channels, with the
block's own output error after compensation at every legal size. The output error has the right shape within a block but
no meaning across blocks (massive activations), so its scale is measured: at a few sizes the compensated block is put
into the dense model and the KL of the output is taken. Between those sizes the cost is interpolated, log KL over log
error. Only forward passes are needed, and one pass over the weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slimexport.architectures.base import Architecture
from slimexport.artifacts import BlockCosts, BlockSizes, ChannelCost, CostTable, HeadCost
from slimexport.pruning.blocks import BlockSource, HiddenStates
from slimexport.pruning.forward import Settings, output, watch, working_copy
from slimexport.pruning.hessian import Moments
from slimexport.pruning.obs import Eliminator, damped_inverse, select_heads
from slimexport.pruning.probe import Candidates

PROBED_SHARES = (0.67, 0.34)  # of the attention's and of the FFN's parameters: the sizes whose KL is measured
CURVE_STEP = 64  # channels that go at once where only the error's curve is wanted


@dataclass(frozen=True)
class Curve:
    """Output error after compensation (any unit) at each size of one part of a block, and the probed W."""

    errors: Mapping[Any, float]  # (kv_groups, heads_per_group) or channels -> error; the dense size has 0
    weights: Mapping[Any, torch.Tensor]  # the sizes to probe -> W with zeros in the removed columns


@torch.no_grad()
def measure_costs(
    *,
    source: BlockSource,
    states: HiddenStates,
    arguments: Callable[[int, int], dict[str, Any]],
    probes: torch.Tensor,
    probe_arguments: Callable[[int], dict[str, Any]],
    logits: Callable[[torch.Tensor], torch.Tensor],
    architecture: Architecture,
    settings: Settings,
    round_to: int,
    identity: Mapping[str, str],
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> CostTable:
    """One pass over the dense blocks of `source`, which are left as they are.

    Args:
        states: hidden states before block 0 that H is taken from, per batch; overwritten.
        probes: [sequences, length, hidden] before block 0, of the windows whose output is compared.
    """
    started = time.monotonic()
    candidates = Candidates(probes)
    curves: list[tuple[Curve, Curve]] = []
    family = architecture.family
    for index in range(len(source)):
        work = working_copy(source.load(index), settings)
        dense = architecture.blocks[index]
        heads = Moments(dense.query_heads * architecture.head_dim, settings.device)
        channels = Moments(dense.channels, settings.device)
        for batch in range(len(states)):
            seen = watch(
                work, (family.attention_output, family.ffn_output), states[batch], arguments(index, batch)
            )  # fmt: skip
            heads.add(seen.inputs[family.attention_output])
            channels.add(seen.inputs[family.ffn_output])
            states[batch] = seen.output
        pair = (
            head_curve(_weight(work, family.attention_output), heads.H(), dense, architecture, settings.damping),
            channel_curve(_weight(work, family.ffn_output), channels.H(), dense, round_to, settings.damping),
        )
        fresh: set[Any] = set()
        for name, curve in zip((family.attention_output, family.ffn_output), pair, strict=True):
            for size, W in curve.weights.items():
                key = (index, name, size)
                with _Replaced(work.get_submodule(name), W):
                    candidates.branch(key, lambda x: output(work(x, **probe_arguments(index))))  # noqa: B023
                fresh.add(key)
        candidates.advance(lambda x: output(work(x, **probe_arguments(index))), fresh)  # noqa: B023
        curves.append(pair)
        progress(index + 1, len(source), f"{len(candidates.states)} candidates")
    measured = candidates.divergences(logits)
    blocks = []
    for index, (head, channel) in enumerate(curves):
        of_heads = {size: measured[index, family.attention_output, size] for size in head.weights}
        of_channels = {size: measured[index, family.ffn_output, size] for size in channel.weights}
        head_costs = interpolate(head.errors, of_heads)
        channel_costs = interpolate(channel.errors, of_channels)
        blocks.append(
            BlockCosts(
                tuple(HeadCost(size[0], size[1], cost) for size, cost in head_costs.items()),
                tuple(ChannelCost(size, cost) for size, cost in channel_costs.items()),
            )
        )
    tokens = probes.shape[0] * probes.shape[1]
    return CostTable(dict(identity), tokens, tuple(blocks), round(time.monotonic() - started, 3))


def head_curve(
    W: torch.Tensor, H: torch.Tensor, dense: BlockSizes, architecture: Architecture, damping: float
) -> Curve:
    """Error of every legal head structure, by the same moves that pruning makes."""
    inverse, dead, _ = damped_inverse(H, damping)
    W = W.masked_fill(dead, 0.0)
    sizes = [(g, h) for g in range(1, dense.kv_groups + 1) for h in range(1, dense.heads_per_group + 1)]
    whole = architecture.attention_parameters(dense)
    share = {(g, h): architecture.attention_parameters(BlockSizes(g, h, dense.channels)) / whole for g, h in sizes}
    errors: dict[tuple[int, int], float] = {}
    found: dict[tuple[int, int], torch.Tensor] = {}
    for groups, per_group in sizes:
        if (groups, per_group) == (dense.kv_groups, dense.heads_per_group):
            errors[groups, per_group] = 0.0
            continue
        selection = select_heads(
            W, inverse, kv_groups=dense.kv_groups, heads_per_group=dense.heads_per_group,
            head_dim=architecture.head_dim, keep_groups=groups, keep_per_group=per_group,
        )  # fmt: skip
        errors[groups, per_group] = selection.error
        found[groups, per_group] = selection.W
    return Curve(errors, {size: found[size] for size in _nearest(share, found)})


def channel_curve(W: torch.Tensor, H: torch.Tensor, dense: BlockSizes, round_to: int, damping: float) -> Curve:
    """Error at every legal channel count, and the compensated W at the probed ones."""
    inverse, dead, _ = damped_inverse(H, damping)
    state = Eliminator(W.masked_fill(dead, 0.0), inverse)
    counts = legal_channels(dense.channels, round_to)
    probed = _nearest({count: count / dense.channels for count in counts}, counts[1:])
    errors = {dense.channels: 0.0}
    weights = {}
    left = dense.channels
    for count in counts[1:]:
        while left > count:
            size = min(CURVE_STEP, left - count)
            state.eliminate(state.channel_scores().sort(stable=True).indices[:size])
            left -= size
        errors[count] = state.error
        if count in probed:
            weights[count] = state.W.clone()
    return Curve(errors, weights)


def legal_channels(dense: int, round_to: int) -> list[int]:
    """Channel counts that a plan may choose, from the dense one down; never none."""
    below = range((dense - 1) // round_to * round_to, 0, -round_to)
    return [dense, *below]


def interpolate(errors: Mapping[Any, float], measured: Mapping[Any, float]) -> dict[Any, float]:
    """A cost for every size from those measured at a few: log cost is piecewise linear in log error.

    Beyond the outermost measured sizes the line goes on, with a slope held between one half and two. An error of zero
    costs nothing; a measured cost of zero counts as the smallest positive one. With nothing measured all cost nothing.
    """
    floor = min((cost for cost in measured.values() if cost > 0), default=0.0)
    points = sorted(
        (math.log(errors[size]), math.log(max(cost, floor)))
        for size, cost in measured.items()
        if errors[size] > 0 and floor > 0
    )
    points = [p for i, p in enumerate(points) if i == 0 or p[0] > points[i - 1][0] + 1e-9]
    return {size: _on_line(points, math.log(error)) if error > 0 and points else 0.0 for size, error in errors.items()}


def _on_line(points: Sequence[tuple[float, float]], x: float) -> float:
    if len(points) == 1:
        return math.exp(points[0][1] + x - points[0][0])
    right = next((i for i, p in enumerate(points) if p[0] >= x), len(points) - 1)
    right = max(right, 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    slope = (y1 - y0) / (x1 - x0)
    if x < x0:
        return math.exp(y0 + min(max(slope, 0.5), 2.0) * (x - x0))
    if x > x1:
        return math.exp(y1 + min(max(slope, 0.5), 2.0) * (x - x1))
    return math.exp(y0 + slope * (x - x0))


def _nearest(shares: Mapping[Any, float], among: Any) -> list[Any]:
    """The sizes whose shares are nearest to the probed ones, each once."""
    found: list[Any] = []
    for wanted in PROBED_SHARES:
        rest = [size for size in among if size not in found]
        if rest:
            found.append(min(rest, key=lambda size: abs(shares[size] - wanted)))
    return found


def _weight(block: nn.Module, module: str) -> torch.Tensor:
    return block.get_parameter(f"{module}.weight").double()


class _Replaced:
    """Within it, the weight of a module is another one of the same shape."""

    def __init__(self, module: nn.Module, W: torch.Tensor):
        self._module, self._new = module, W

    def __enter__(self) -> None:
        parameter: Any = self._module.weight
        self._old = parameter.data
        parameter.data = self._new.to(self._old.dtype)

    def __exit__(self, *_: object) -> None:
        parameter: Any = self._module.weight
        parameter.data = self._old
