"""The cheapest legal plan by measured costs: what each size of each block's heads and channels costs the model.

Each was cut alone, and the costs of several add up to what they cost together, but for one thing that is measured too:
with heads the whole is more than the sum of its parts, the more so the more go. What all heads cost together is taken
as a function J of the sum of their costs alone, and so for the channels. The plan that makes J_heads + J_channels least
is found by solving for the sum with the slopes of J as prices, until the slopes are those of the plan they lead to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from slimexport.artifacts import BlockSizes, CostTable, JointCost
from slimexport.errors import BadInputError
from slimexport.pruning.allocation import TOLERANCE, Request, registry
from slimexport.pruning.solver import Option, cheapest

ROUNDS = 12  # of prices; the best plan met on the way is taken


class Sensitivity:
    needs_costs = True

    def __call__(self, request: Request) -> tuple[BlockSizes, ...]:
        costs = _costs(request)
        if request.layout == "uniform":
            return (_cheapest_uniform(request, costs),) * len(request.architecture.blocks)
        return assembled([option.choice for option in _solve(request, costs)[0]])


def assembled(chosen: Sequence[BlockSizes]) -> tuple[BlockSizes, ...]:
    """The blocks of a plan from what was chosen of `block_parts`."""
    return tuple(
        replace(heads, channels=channels.channels) for heads, channels in zip(chosen[::2], chosen[1::2], strict=True)
    )


def block_parts(request: Request) -> list[list[Option[BlockSizes]]]:
    """Heads, then channels of every block, priced so that the cheapest of their sums is the allocation's plan."""
    costs = _costs(request)
    return _priced(request, costs, _solve(request, costs)[1])


def _costs(request: Request) -> CostTable:
    if request.costs is None:
        raise BadInputError("allocation sensitivity needs measured costs: prune the model, or give --costs FILE.")
    return request.costs


def _solve(request: Request, costs: CostTable) -> tuple[list[Option[BlockSizes]], tuple[float, float]]:
    """The options of the best plan, at their own costs, and the prices of heads and channels that lead to it."""
    at_cost = [{option.choice: option for option in part} for part in _priced(request, costs, (1.0, 1.0))]
    prices, best = (1.0, 1.0), math.inf
    for _ in range(ROUNDS):
        priced = _priced(request, costs, prices)
        chosen = [
            own[option.choice] for own, option in zip(at_cost, cheapest(priced, request.wanted_parameters), strict=True)
        ]
        heads, channels = (sum(option.cost for option in chosen[kind::2]) for kind in (0, 1))
        total = together(costs.joint_heads, heads)[0] + together(costs.joint_channels, channels)[0]
        if total < best - 1e-12:
            best, found, leading = total, chosen, prices
        slopes = together(costs.joint_heads, heads)[1], together(costs.joint_channels, channels)[1]
        if max(abs(math.log(new / old)) for new, old in zip(slopes, prices, strict=True)) < 1e-3:
            break
        # The geometric mean of old and new: plans jump from one legal size to another, and prices with them.
        prices = math.sqrt(prices[0] * slopes[0]), math.sqrt(prices[1] * slopes[1])
    return found, leading


def together(points: Sequence[JointCost], alone: float) -> tuple[float, float]:
    """J and its slope at a sum of costs: J / sum is 1 at nothing, as measured at the points, linear between them and
    level beyond; without points J is the sum. The slope is at least 0.1, so that every price is one."""
    known = sorted((point.alone, point.together / point.alone) for point in points if point.alone > 0)
    x0, m0 = 0.0, 1.0
    for x1, m1 in known:
        if x1 <= x0:
            continue
        if alone <= x1:
            rise = (m1 - m0) / (x1 - x0)
            factor = m0 + rise * (alone - x0)
            return alone * factor, max(factor + alone * rise, 0.1)
        x0, m0 = x1, m1
    return alone * m0, max(m0, 0.1)


def _priced(request: Request, table: CostTable, prices: tuple[float, float]) -> list[list[Option[BlockSizes]]]:
    parts: list[list[Option[BlockSizes]]] = []
    architecture = request.architecture
    for own, dense, costs in zip(architecture.by_block, architecture.blocks, table.blocks, strict=True):
        heads = [
            (replace(dense, kv_groups=c.kv_groups, heads_per_group=c.heads_per_group), c.cost) for c in costs.heads
        ]
        parts.append([Option(own.attention_parameters(s), prices[0] * cost, s) for s, cost in heads])
        parts.append([
            Option(c.channels * own.channel_parameters(), prices[1] * c.cost,
                   replace(dense, channels=c.channels))
            for c in costs.channels
        ])  # fmt: skip
    return parts


def _cheapest_uniform(request: Request, table: CostTable) -> BlockSizes:
    """Of the sizes that all blocks can have, the cheapest within reach of the ratio; the nearest where none is."""
    architecture, blocks = request.architecture, table.blocks
    heads: dict[tuple[int, int], float] = {}
    channels: dict[int, float] = {}
    for own, costs in zip(architecture.by_block, blocks, strict=True):
        for h in costs.heads if own.has_heads else ():
            heads[h.kv_groups, h.heads_per_group] = heads.get((h.kv_groups, h.heads_per_group), 0.0) + h.cost
        for c in costs.channels if own.has_channels else ():
            channels[c.channels] = channels.get(c.channels, 0.0) + c.cost
    dense = architecture.linear_parameters(architecture.blocks)
    options = [
        (
            abs(1 - architecture.linear_parameters([sizes] * len(blocks)) / dense - request.ratio),
            together(table.joint_heads, head_cost)[0] + together(table.joint_channels, channel_cost)[0],
            sizes,
        )
        for (groups, per_group), head_cost in heads.items()
        for count, channel_cost in channels.items()
        if architecture.plain_config_can_say(sizes := BlockSizes(groups, per_group, count))
    ]
    near = [(cost, off, sizes) for off, cost, sizes in options if off <= TOLERANCE]
    if near:
        return min(near, key=lambda option: option[:2])[2]
    return min(options, key=lambda option: option[:2])[2]


registry.register("sensitivity")(Sensitivity())
