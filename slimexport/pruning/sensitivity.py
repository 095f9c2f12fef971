"""What each size of each block's heads and channels costs the model: KL of its output, the rest being dense.

Per block: H of its dense inputs, the order in which the criterion's mathematics removes heads and channels, with the
block's own output error after compensation at every legal size. The output error has the right shape within a block but
no meaning across blocks (massive activations), so its scale is measured: at a few sizes the compensated block is put
into the dense model and the KL of the output is taken. Between those sizes the cost is interpolated, log KL over log
error. The same cuts are also made in all blocks at once, heads and channels apart: with heads the whole is more than
the sum of its parts. Only forward passes are needed, and one pass over the weights (curvature has its own).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from slimexport.architectures.base import Architecture
from slimexport.artifacts import BlockCosts, BlockSizes, ChannelCost, CostTable, HeadCost, JointCost
from slimexport.errors import BadInputError
from slimexport.pruning import grid
from slimexport.pruning.blocks import BlockSource
from slimexport.pruning.curvature import BlockCurvature, Weighting, unweighted, weighted
from slimexport.pruning.experts import add_ffn_inputs, ffn_matrices
from slimexport.pruning.forward import Settings, output, watch, working_copy
from slimexport.pruning.grid import legal_channels
from slimexport.pruning.hessian import Moments, check_finite, overflow, solvable
from slimexport.pruning.inverse import DampedInverse, solved
from slimexport.pruning.matrices import matrix
from slimexport.pruning.obs import Eliminator, walk_heads
from slimexport.pruning.probe import Candidates, Cut, replaced
from slimexport.pruning.states import HiddenStates
from slimexport.ranks import Message, Ranks

CURVE_STEP = 64  # channels that go at once where only the error's curve is wanted


@dataclass(frozen=True)
class Curve:
    """Output error after compensation (any unit) at each size of one part of a block, and the matrix at some."""

    errors: Mapping[Any, float]  # (kv_groups, heads_per_group) or channels -> error; the dense size has 0
    probed: Sequence[Any]  # the sizes whose KL is to be measured
    searched: Sequence[Any]  # the sizes that a search may choose from, the dense one among them
    cuts: Mapping[Any, Cut]  # of all of these but the dense one


class CurveKeeper(Protocol):
    """Takes what a search needs of each block, as soon as it is made."""

    def __call__(self, block: int, heads: Curve, channels: Curve, /) -> None: ...


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
    curvature: Sequence[BlockCurvature] = (),
    keep: CurveKeeper | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> CostTable:
    """One pass over the dense blocks of `source`, which are left as they are. Of several ranks the first makes the
    curves, and each passes its part of the candidates on; all have the table in the end.

    Args:
        states: hidden states before block 0 that H is taken from, per batch; overwritten. Only the first rank's count.
        probes: [sequences, length, hidden] before block 0, of the windows whose output is compared.
        curvature: of every block's outputs, to weight errors by, as the criterion will; none: all count alike.
        keep: given the curves of every block with all cuts that are searched over; None: only probed ones are made.
    """
    started = time.monotonic()
    ranks, family = settings.ranks, architecture.family
    names = (family.attention_output, family.ffn_output)
    candidates = Candidates(probes, settings.keep)
    order: list[Any] = []  # of all candidates, on whatever rank

    def mine(candidate: Any) -> bool:
        """Candidates are dealt out to the ranks, one by one; to be asked once, in the same order, by all."""
        order.append(candidate)
        return (len(order) - 1) % ranks.size == ranks.rank

    levels = range(len(grid.PROBED_SHARES))
    for joint in [(name, level) for name in names for level in levels]:
        if mine(joint):
            candidates[joint] = probes
    curves: list[tuple[Curve, Curve]] = []
    for index in range(len(source)):
        work = working_copy(source.load(index), settings)

        def made(index: int = index, work: nn.Module = work) -> tuple[Curve, Curve]:
            minded = curvature[index] if curvature else {}
            return _curves(
                index, work, states, arguments, architecture, settings, round_to, minded, searched=keep is not None
            )

        pair = _told(ranks, made, settings.device)
        if keep is not None:
            keep(index, *pair)
        fresh: set[Any] = set()
        for name, curve in zip(names, pair, strict=True):
            for size in curve.probed:
                key = (index, name, size)
                if mine(key):
                    with replaced(work, name, curve.cuts[size]):
                        candidates.branch(key, lambda x: output(work(x, **probe_arguments(index))))  # noqa: B023
                    fresh.add(key)
        for name, curve in zip(names, pair, strict=True):
            for level in levels:
                if (name, level) in candidates:
                    cut = curve.cuts[curve.probed[min(level, len(curve.probed) - 1)]] if curve.probed else None
                    with replaced(work, name, cut):
                        candidates[name, level] = output(work(candidates[name, level], **probe_arguments(index)))
                    fresh.add((name, level))
        candidates.advance(lambda x: output(work(x, **probe_arguments(index))), fresh)  # noqa: B023
        source.release(index)
        curves.append((replace(pair[0], cuts={}), replace(pair[1], cuts={})))
        progress(index + 1, len(source), f"{len(order)} candidates")
    own = candidates.divergences(logits)
    found = torch.tensor([own.get(candidate, 0.0) for candidate in order], dtype=torch.float64)
    ranks.add_up([found])
    measured = dict(zip(order, found.tolist(), strict=True))
    if not all(math.isfinite(cost) for cost in measured.values()):
        raise BadInputError(f"The model's output on the probe tokens is not finite in {overflow(settings.dtype)}.")
    blocks = []
    for index, (head, channel) in enumerate(curves):
        kl_heads = {size: measured[index, family.attention_output, size] for size in head.probed}
        kl_channels = {size: measured[index, family.ffn_output, size] for size in channel.probed}
        head_costs = interpolate(head.errors, kl_heads)
        channel_costs = interpolate(channel.errors, kl_channels)
        blocks.append(
            BlockCosts(
                tuple(HeadCost(size[0], size[1], cost) for size, cost in head_costs.items()),
                tuple(ChannelCost(size, cost) for size, cost in channel_costs.items()),
            )
        )
    return CostTable(
        identity=dict(identity),
        tokens=probes.shape[0] * probes.shape[1],
        blocks=tuple(blocks),
        seconds=round(time.monotonic() - started, 3),
        joint_heads=_joint(measured, family.attention_output, [head.probed for head, _ in curves]),
        joint_channels=_joint(measured, family.ffn_output, [channel.probed for _, channel in curves]),
    )


def _curves(
    index: int,
    work: nn.Module,
    states: HiddenStates,
    arguments: Callable[[int, int], dict[str, Any]],
    architecture: Architecture,
    settings: Settings,
    round_to: int,
    minded: BlockCurvature,
    *,
    searched: bool,
) -> tuple[Curve, Curve]:
    """Of the heads and the channels of one block; its `states` move on through it."""
    own, dense, family = architecture.by_block[index], architecture.blocks[index], architecture.family
    heads = Moments(dense.query_heads * architecture.head_dim, settings.device)
    channels = [Moments(dense.channels, settings.device) for _ in range(architecture.experts)]
    for batch in range(len(states)):
        seen = watch(work, own.outputs, states[batch], arguments(index, batch))
        if own.has_heads:
            heads.add(seen.inputs[family.attention_output][0])
        if own.has_channels:
            add_ffn_inputs(channels, work.get_submodule(family.ffn_output), seen.inputs[family.ffn_output])
        states[batch] = seen.output
    of_heads = _nothing_to_cut((dense.kv_groups, dense.heads_per_group))
    of_channels = _nothing_to_cut(dense.channels)
    with solvable(index):
        names = (family.attention_output, family.ffn_output)
        weightings = [Weighting.of(minded.get(name), settings.device) for name in names]
        if own.has_heads:
            H = _checked(heads, index, settings)
            W = matrix(work.get_submodule(family.attention_output))
            of_heads, _ = solved(
                H, settings.damping,
                lambda found: head_curve(W, found, dense, own, weightings[0], searched=searched),
            )  # fmt: skip
        if own.has_channels:
            each = [_checked(moments, index, settings) for moments in channels]
            of_channels = joined([
                solved(
                    H, settings.damping,
                    lambda found: channel_curve(V, found, dense, round_to, weightings[1], searched=searched),  # noqa: B023
                )[0]
                for V, H in zip(ffn_matrices(work.get_submodule(family.ffn_output)), each, strict=True)
            ], [moments.tokens for moments in channels])  # fmt: skip
    return of_heads, of_channels


def _told(ranks: Ranks, make: Callable[[], tuple[Curve, Curve]], device: torch.device) -> tuple[Curve, Curve]:
    """What the first rank has made of a block: the others need its matrices to put their candidates together."""

    def said() -> Message:
        values, tensors = [], {}
        for part, curve in enumerate(make()):
            for number, cut in enumerate(curve.cuts.values()):
                tensors[f"{part}.{number}.W"], tensors[f"{part}.{number}.columns"] = cut.W, cut.columns
            sizes = {"probed": list(curve.probed), "searched": list(curve.searched), "cuts": list(curve.cuts)}
            values.append({"errors": list(curve.errors.items()), **sizes})
        return Message({"curves": values}, tensors)

    def size(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    heard = ranks.told(said)
    curves = []
    for part, of in enumerate(json.loads(json.dumps(heard.values["curves"]))):
        cuts = {}
        for number, key in enumerate(of["cuts"]):
            W, columns = (heard.tensors[f"{part}.{number}.{name}"].to(device) for name in ("W", "columns"))
            cuts[size(key)] = Cut(columns, W)
        errors = {size(key): error for key, error in of["errors"]}
        curves.append(Curve(errors, [*map(size, of["probed"])], [*map(size, of["searched"])], cuts))
    return curves[0], curves[1]


def _checked(moments: Moments, index: int, settings: Settings) -> torch.Tensor:
    """H, which is finite."""
    H = moments.H()
    check_finite(H.diagonal(), index, settings.dtype)
    return H


def _nothing_to_cut(whole: Any) -> Curve:
    return Curve({whole: 0.0}, [], [whole], {})


def _joint(measured: Mapping[Any, float], name: str, probed: Sequence[Sequence[Any]]) -> tuple[JointCost, ...]:
    """From measured[block, name, size] of every block alone and measured[name, level] of all at once."""
    costs = []
    for level in range(len(grid.PROBED_SHARES)):
        sizes = [(block, own[min(level, len(own) - 1)]) for block, own in enumerate(probed) if own]
        alone = sum(measured[block, name, size] for block, size in sizes)
        if alone > 0:
            costs.append(JointCost(alone, measured[name, level]))
    return tuple(costs)


def head_curve(
    W: torch.Tensor,
    found: DampedInverse,
    dense: BlockSizes,
    architecture: Architecture,
    weighting: Weighting | None = None,
    *,
    searched: bool = False,
) -> Curve:
    """Error of every legal head structure, by the moves that pruning makes, whole groups first.

    Args:
        W: o_proj [out, in]; found: of H, mean x x^T of its inputs, [in, in].
        weighting: what errors are weighted by; None: all count alike.
        searched: also the cuts that a search chooses from.
    """
    inverse = found.inverse
    W = weighted(W.double().masked_fill(found.dead, 0.0), weighting)
    whole = (dense.kv_groups, dense.heads_per_group)
    sizes = architecture.legal_heads(dense)
    if sizes == [whole]:
        return _nothing_to_cut(whole)
    share = {(g, h): float(architecture.attention_parameters(BlockSizes(g, h, dense.channels))) for g, h in sizes}
    share = {size: parameters / share[whole] for size, parameters in share.items()}
    steps = torch.arange(architecture.head_dim, device=W.device)
    errors: dict[grid.Heads, float] = {}
    kept: dict[grid.Heads, tuple[int, ...]] = {}
    for size, heads, error in walk_heads(
        W, inverse, kv_groups=dense.kv_groups, heads_per_group=dense.heads_per_group, head_dim=architecture.head_dim
    ):
        errors[size] = error
        if size != whole:
            kept[size] = heads
    probed = grid.probed(share, kept)
    choices = grid.searched_heads(errors, share) if searched else []
    cuts = {}
    for size in dict.fromkeys([*probed, *choices]):
        if size == whole:
            continue
        # Solved once more, jointly: holding the matrices of all structures until here would take gigabytes.
        state = Eliminator(W, inverse)
        gone = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
        gone[(torch.tensor(kept[size], device=W.device).unsqueeze(1) * architecture.head_dim + steps).flatten()] = False
        state.eliminate(gone.nonzero().flatten())
        cuts[size] = _cut(state, weighting)
    return Curve(errors, probed, choices, cuts)


def channel_curve(
    W: torch.Tensor,
    found: DampedInverse,
    dense: BlockSizes,
    round_to: int,
    weighting: Weighting | None = None,
    *,
    searched: bool = False,
) -> Curve:
    """Error at every legal channel count, groups of channels going at once between two of them.

    Args:
        W: down_proj [out, channels]; found: of H, mean x x^T of its inputs, [channels, channels].
        weighting: what errors are weighted by; None: all count alike.
        searched: also the cuts that a search chooses from.
    """
    state = Eliminator(weighted(W.double().masked_fill(found.dead, 0.0), weighting), found.inverse)
    counts = legal_channels(dense.channels, round_to)
    probed = grid.probed({count: count / dense.channels for count in counts}, counts[1:])
    choices = grid.searched_channels(counts) if searched else []
    errors = {dense.channels: 0.0}
    cuts = {}
    left = dense.channels
    for count in counts[1:]:
        while left > count:
            size = min(CURVE_STEP, left - count)
            state.eliminate(state.channel_scores().sort(stable=True).indices[:size])
            left -= size
        errors[count] = state.error
        if count in probed or count in choices:
            cuts[count] = _cut(state, weighting)
    return Curve(errors, probed, choices, cuts)


def joined(curves: Sequence[Curve], tokens: Sequence[int]) -> Curve:
    """One curve of all experts of a block, which lose channels together: errors are means over the tokens that each
    saw, so they add up by their shares of them."""
    if len(curves) == 1:
        return curves[0]
    first, total = curves[0], max(sum(tokens), 1)
    errors = {
        size: sum(curve.errors[size] * count / total for curve, count in zip(curves, tokens, strict=True))
        for size in first.errors
    }
    cuts = {
        size: Cut(
            torch.stack([curve.cuts[size].columns for curve in curves]),
            torch.stack([curve.cuts[size].W for curve in curves]),
        )
        for size in first.cuts
    }
    return Curve(errors, first.probed, first.searched, cuts)


def _cut(state: Eliminator, weighting: Weighting | None) -> Cut:
    columns = state.alive.nonzero().flatten()
    return Cut(columns, unweighted(state.W[:, columns].double(), weighting).float())


def interpolate(errors: Mapping[Any, float], measured: Mapping[Any, float]) -> dict[Any, float]:
    """A cost for every size from those measured at a few: log cost is piecewise linear in log error.

    Below the smallest measured error the slope is one: the KL of a small change is quadratic in it, as is the error.
    Above the largest the line goes on, with a slope held between one half and two. An error of zero costs nothing; a
    measured cost of zero counts as the smallest positive one. With nothing measured all cost nothing.
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
        return math.exp(y0 + x - x0)
    if x > x1:
        return math.exp(y1 + min(max(slope, 0.5), 2.0) * (x - x1))
    return math.exp(y0 + slope * (x - x0))
