"""The cheapest legal plan by measured costs: what each size of each block's heads and channels costs the model."""

from __future__ import annotations

from dataclasses import replace

from slimexport.artifacts import BlockSizes
from slimexport.errors import BadInputError
from slimexport.pruning.allocation import Request, registry
from slimexport.pruning.solver import Option, cheapest


class Sensitivity:
    """Costs of different blocks are added up, as if each were cut alone; that is what makes the plan exact to solve."""

    needs_costs = True

    def __call__(self, request: Request) -> tuple[BlockSizes, ...]:
        if request.costs is None:
            raise BadInputError("allocation sensitivity needs measured costs: prune the model, or give --costs FILE.")
        parts = _uniform_parts(request) if request.layout == "uniform" else _block_parts(request)
        dense = request.architecture.blocks
        wanted = (1 - request.ratio) * sum(request.architecture.block_linear_parameters(b) for b in dense)
        chosen = [option.choice for option in cheapest(parts, round(wanted))]
        if request.layout == "uniform":
            return (chosen[0],) * len(dense)
        return tuple(
            replace(heads, channels=channels.channels)
            for heads, channels in zip(chosen[::2], chosen[1::2], strict=True)
        )


def _block_parts(request: Request) -> list[list[Option[BlockSizes]]]:
    """Heads and channels of every block, each with its own price."""
    assert request.costs is not None
    parts: list[list[Option[BlockSizes]]] = []
    architecture = request.architecture
    for dense, costs in zip(architecture.blocks, request.costs.blocks, strict=True):
        heads = [
            (replace(dense, kv_groups=c.kv_groups, heads_per_group=c.heads_per_group), c.cost) for c in costs.heads
        ]
        parts.append([Option(architecture.attention_parameters(s), cost, s) for s, cost in heads])
        parts.append([
            Option(c.channels * architecture.channel_parameters(), c.cost, replace(dense, channels=c.channels))
            for c in costs.channels
        ])  # fmt: skip
    return parts


def _uniform_parts(request: Request) -> list[list[Option[BlockSizes]]]:
    """One part only: every size that all blocks can have, at the sum of its costs over the blocks."""
    assert request.costs is not None
    architecture, blocks = request.architecture, request.costs.blocks
    heads: dict[tuple[int, int], float] = {}
    channels: dict[int, float] = {}
    for costs in blocks:
        for h in costs.heads:
            heads[h.kv_groups, h.heads_per_group] = heads.get((h.kv_groups, h.heads_per_group), 0.0) + h.cost
        for c in costs.channels:
            channels[c.channels] = channels.get(c.channels, 0.0) + c.cost
    options = [
        Option(len(blocks) * architecture.block_linear_parameters(sizes), head_cost + channel_cost, sizes)
        for (groups, per_group), head_cost in heads.items()
        for count, channel_cost in channels.items()
        if architecture.plain_config_can_say(sizes := BlockSizes(groups, per_group, count))
    ]
    # Few of all sizes hit the ratio exactly; the cheapest of those within reach is worth more than the nearest.
    wanted = (1 - request.ratio) * sum(architecture.block_linear_parameters(b) for b in architecture.blocks)
    near = [o for o in options if abs(o.parameters - wanted) <= 0.005 * wanted / (1 - request.ratio)]
    if near:
        best = min(near, key=lambda o: o.cost)
        return [[best]]
    return [options]


registry.register("sensitivity")(Sensitivity())
