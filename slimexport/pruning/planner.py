"""From a ratio to legal, rounded sizes for every block; reads no weights.

Legal means: every kept KV group has the same number of query heads, at least one head and one step of channels stay,
channels are multiples of `round_to` (or the dense count), and the config of the family can say it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slimexport.architectures.base import Architecture
from slimexport.architectures.weights import SHARED
from slimexport.artifacts import BlockSizes, CostTable, PruningPlan
from slimexport.errors import BadInputError
from slimexport.pruning import allocation as allocations
from slimexport.pruning.allocation import TOLERANCE

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def make_plan(
    architecture: Architecture,
    *,
    ratio: float | None,
    criterion: str,
    allocation: str,
    layout: str,
    round_to: int = 32,
    first_ratio: float | None = None,
    head_weight: float = 1.0,
    stored_dtype: str = "float32",
    table: Path | None = None,
    costs: CostTable | None = None,
    search: allocations.SearchSettings | None = None,
) -> PruningPlan:
    """Plans `ratio` over the blocks. Where the allocation gives ratios by block, heads lose `head_weight` times their
    block's ratio and channels make up the rest; where it gives sizes, those are checked. `ratio` None: whatever the
    given sizes remove (allocation explicit only).

    Raises BadInputError where the ratio is beyond what legality allows, with the most that is possible."""
    notes: list[str] = []
    dense = architecture.blocks
    spread = allocations.registry.get(allocation)
    request = allocations.Request(
        architecture, ratio or 0.0, layout, round_to, first_ratio, table, costs, search, notes.append
    )  # fmt: skip
    if layout == "uniform" and len(set(dense)) > 1:
        raise BadInputError(
            "layout uniform needs the same sizes in every block, but those of this model differ already."
        )
    if layout == "uniform" and not architecture.family.channels_of_experts_alone:
        family = architecture.family
        raise BadInputError(
            f"layout uniform cannot prune a {family.model_type} model: its {family.channels_field} says the width of "
            "the shared experts too, which stay dense: use --layout per_layer."
        )
    if ratio == 0 and allocation != "explicit":
        blocks = dense
    else:
        if ratio is not None:
            _check_possible(architecture, ratio, _smallest_blocks(architecture, round_to))
        wish = spread(request)
        if isinstance(wish[0], BlockSizes):
            blocks = tuple(b for b in wish if isinstance(b, BlockSizes))
            _check_sizes(architecture, blocks, ratio, layout, allocation)
        elif ratio is None:
            raise ValueError(f"allocation {allocation} needs a ratio")
        elif layout == "uniform":
            blocks, note = _uniform_blocks(architecture, ratio, round_to, head_weight)
            notes += note
        else:
            ratios = _clip(architecture, [float(w) for w in wish], ratio, round_to)  # type: ignore[arg-type]
            blocks = _per_layer_blocks(architecture, ratios, ratio, round_to, head_weight)
    if blocks != dense:
        notes += left_dense(architecture)
    reached = ratio_of(architecture, blocks)
    ratio = reached if ratio is None else ratio
    if abs(reached - ratio) > TOLERANCE:
        notes.append(f"rounding to legal sizes reaches {reached:.4f} instead of {ratio:.4f}")
    if stored_dtype not in BYTES:
        raise BadInputError(f"The model is stored as {stored_dtype}: name another --save-dtype ({', '.join(BYTES)}).")
    size = BYTES[stored_dtype]
    return PruningPlan(
        model_type=architecture.family.model_type,
        criterion=criterion,
        allocation=allocation,
        layout=layout,
        ratio_asked=ratio,
        ratio=reached,
        dense=dense,
        blocks=blocks,
        dense_estimates=architecture.estimates(size),
        estimates=architecture.with_blocks(blocks).estimates(size),
        notes=tuple(notes),
    )


def _check_sizes(
    architecture: Architecture, blocks: tuple[BlockSizes, ...], ratio: float | None, layout: str, allocation: str
) -> None:
    """Sizes that an allocation gave are taken as they are, or not at all."""
    if layout == "uniform" and len(set(blocks)) > 1:
        raise BadInputError(
            f"layout uniform has the same sizes in every block, but allocation {allocation} gives blocks of "
            f"{len(set(blocks))} different sizes: use --layout per_layer."
        )
    if layout == "uniform" and not architecture.plain_config_can_say(blocks[0]):
        raise BadInputError(
            f"layout uniform is for plain configs, but that of {architecture.family.model_type} refuses "
            f"{blocks[0].query_heads} query heads (they must divide {architecture.hidden}): use --layout per_layer."
        )
    if allocation == "explicit" and ratio is not None and abs(ratio_of(architecture, blocks) - ratio) > TOLERANCE:
        raise BadInputError(
            f"The given sizes remove {ratio_of(architecture, blocks):.4f} of the block linear parameters, "
            f"not {ratio:g}: leave out --ratio, or change them."
        )


def ratio_of(architecture: Architecture, blocks: Sequence[BlockSizes]) -> float:
    """Share of the block linear parameters that `blocks` removes."""
    return 1 - architecture.linear_parameters(blocks) / architecture.linear_parameters(architecture.blocks)


def left_dense(architecture: Architecture) -> list[str]:
    """What of a model is not pruned, whatever the ratio, and why."""
    notes = []
    if not architecture.family.heads_prunable:
        notes.append(f"all heads stay: {architecture.family.model_type} norms q and k over all of them together")
    if architecture.fixed_axes.get(SHARED):
        notes.append("the expert that sees every token stays dense; it is no part of the ratio")
    family = architecture.family
    for part, of, why in (
        ("heads", "has_heads", family.without_heads),
        ("channels", "has_channels", family.without_channels),
    ):
        without = [i for i, own in enumerate(architecture.by_block) if not getattr(own, of)]
        if without:
            notes.append(
                f"no {part} to prune in {_named(without)}: {why}; what is there stays dense and is no part of the ratio"
            )
    return notes


def _named(blocks: list[int]) -> str:
    """1, 2, 3, 7 -> blocks 1-3, 7."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    said = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"block{'s' if len(blocks) > 1 else ''} {said}"


def head_structures(architecture: Architecture, dense: BlockSizes) -> list[BlockSizes]:
    """Every legal (KV groups, heads per group) of a block, with its dense channels."""
    return [replace(dense, kv_groups=g, heads_per_group=h) for g, h in architecture.legal_heads(dense)]


def _smallest_blocks(architecture: Architecture, round_to: int) -> list[BlockSizes]:
    each = zip(architecture.by_block, architecture.blocks, strict=True)
    return [_smallest(own, dense, round_to) for own, dense in each]


def _smallest(own: Architecture, dense: BlockSizes, round_to: int) -> BlockSizes:
    groups, per_group = min(own.legal_heads(dense))
    return BlockSizes(groups, per_group, min(round_to, dense.channels) if own.has_channels else dense.channels)


def _check_possible(architecture: Architecture, ratio: float, smallest: Sequence[BlockSizes], why: str = "") -> None:
    most = ratio_of(architecture, smallest)
    if ratio > most + TOLERANCE:
        raise BadInputError(
            f"ratio {ratio:g} is beyond what legal sizes allow: "
            f"the most that can be removed from this model is {most:.4f}{why}."
        )


def _clip(architecture: Architecture, wanted: Sequence[float], ratio: float, round_to: int) -> list[float]:
    """Wanted ratios clipped to what each block can lose; what that cuts off is handed to the others in equal parts."""
    each = list(zip(architecture.by_block, architecture.blocks, strict=True))
    linear = [own.block_linear_parameters(b) for own, b in each]
    most = [
        1 - own.block_linear_parameters(_smallest(own, b, round_to)) / p if p else 0.0
        for (own, b), p in zip(each, linear, strict=True)
    ]
    shift_low, shift_high = -1.0, 1.0
    for _ in range(60):  # bisection on one shift: the mean of clip(wanted + shift) rises with it
        shift = (shift_low + shift_high) / 2
        clipped = [min(max(w + shift, 0.0), m) for w, m in zip(wanted, most, strict=True)]
        mean = sum(c * p for c, p in zip(clipped, linear, strict=True)) / sum(linear)
        shift_low, shift_high = (shift, shift_high) if mean < ratio else (shift_low, shift)
    return clipped


def _per_layer_blocks(
    architecture: Architecture, ratios: Sequence[float], ratio: float, round_to: int, head_weight: float
) -> tuple[BlockSizes, ...]:
    """Heads rounded with the error carried to the next block, channels filling up each block's share, and last a
    correction of single steps until the whole is as near to the ratio as the steps allow."""
    each = list(zip(architecture.by_block, architecture.blocks, strict=True))
    blocks: list[BlockSizes] = []
    residue: list[float] = []  # parameters that a block has too many (+) or too few (-) after rounding
    carry = 0.0
    for (own, dense), share in zip(each, ratios, strict=True):
        attention = max(0.0, 1 - head_weight * share) * own.attention_parameters(dense)
        block = _nearest_heads(own, dense, attention - carry)
        carry += own.attention_parameters(block) - attention
        target = (1 - share) * own.block_linear_parameters(dense)
        if own.has_channels:
            room = (target - own.attention_parameters(block)) / own.channel_parameters()
            block = replace(block, channels=_round_channels(room, dense, round_to))
        blocks.append(block)
        residue.append(own.block_linear_parameters(block) - target)
    wanted = (1 - ratio) * architecture.linear_parameters(architecture.blocks)
    while True:
        off = architecture.linear_parameters(blocks) - wanted
        step = -1 if off > 0 else 1
        options = [
            (residue[i] * step, i, moved)
            for i, (b, (own, dense)) in enumerate(zip(blocks, each, strict=True))
            if own.has_channels and (moved := _move_channels(b, dense, step, round_to)) is not None
        ]
        if not options:
            return tuple(blocks)
        _, i, moved = min(options)
        change = (moved - blocks[i].channels) * each[i][0].channel_parameters()
        if abs(off + change) >= abs(off):
            return tuple(blocks)
        blocks[i] = replace(blocks[i], channels=moved)
        residue[i] += change


def _uniform_blocks(
    architecture: Architecture, ratio: float, round_to: int, head_weight: float
) -> tuple[tuple[BlockSizes, ...], list[str]]:
    """One size for all blocks: the legal heads nearest to their share, then the channels that reach the ratio; and what
    the config could not say."""
    dense, count = architecture.blocks[0], len(architecture.blocks)

    def attention(heads: BlockSizes) -> int:
        return sum(own.attention_parameters(heads) for own in architecture.by_block)

    # Sizes that a block of another kind has no use for may be any.
    structures = max((head_structures(own, dense) for own in architecture.by_block), key=len)
    legal = [s for s in structures if architecture.plain_config_can_say(s)]
    smallest = replace(min(legal, key=attention), channels=min(round_to, dense.channels))
    why = ""
    if len(legal) == 1:
        name = architecture.family.model_type
        why = f" with layout uniform, in which a {name} model keeps its heads; layout per_layer can remove more"
    _check_possible(architecture, ratio, [smallest] * count, why)
    whole = architecture.linear_parameters(architecture.blocks)
    channel = sum(own.channel_parameters() for own in architecture.by_block)

    def fill(heads: BlockSizes) -> BlockSizes:
        room = ((1 - ratio) * whole - attention(heads)) / channel
        return replace(heads, channels=_round_channels(room, dense, round_to))

    def miss(block: BlockSizes) -> tuple[bool, float, int]:
        off = abs(architecture.linear_parameters([block] * count) / whole - (1 - ratio))
        wanted = max(0.0, 1 - head_weight * ratio) * attention(dense)
        return off > TOLERANCE, abs(attention(block) - wanted), -block.query_heads

    chosen, freely = (min((fill(s) for s in among), key=miss) for among in (legal, structures))
    notes = []
    if (chosen.kv_groups, chosen.heads_per_group) != (freely.kv_groups, freely.heads_per_group):
        notes.append(
            f"a plain {architecture.family.model_type} config cannot say {freely.query_heads} query heads in "
            f"{freely.kv_groups} KV groups: {chosen.query_heads} in {chosen.kv_groups} instead"
        )
    return (chosen,) * count, notes


def _nearest_heads(architecture: Architecture, dense: BlockSizes, wanted: float) -> BlockSizes:
    """The legal heads whose parameters are nearest to `wanted`; of equals the one with more query heads."""
    return min(
        head_structures(architecture, dense),
        key=lambda s: (abs(architecture.attention_parameters(s) - wanted), -s.query_heads),
    )


def _round_channels(wanted: float, dense: BlockSizes, round_to: int) -> int:
    steps = round(wanted / round_to) * round_to
    if wanted > dense.channels - round_to / 2:
        return dense.channels
    return max(min(steps, dense.channels), min(round_to, dense.channels))


def _move_channels(block: BlockSizes, dense: BlockSizes, step: int, round_to: int) -> int | None:
    """The next legal channel count up (+1) or down (-1), None at the end."""
    if step > 0:
        up = min((block.channels // round_to + 1) * round_to, dense.channels)
        return up if up > block.channels else None
    down = ((block.channels - 1) // round_to) * round_to
    return down if down >= min(round_to, dense.channels) and down < block.channels else None
