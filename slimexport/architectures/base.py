"""An architecture is a table of its weights whose axes are named; everything about sizes follows from it.

A family (llama, qwen3, ...) is data: which weights a block has, along which axes they run, and what its modules and
config fields are called. `Architecture` is a family with the sizes of one model. From the table follow parameter,
byte and FLOP counts, the shapes of every checkpoint, and how each weight is sliced when heads and channels go, with or
without modules in memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import requires, version
from typing import TYPE_CHECKING, Any

from slimexport.architectures.family import Family, Kept
from slimexport.architectures.weights import (
    CHANNELS,
    EXPERTS,
    GATED_QUERY,
    HEAD_DIM,
    KEY_VALUE,
    KV_GROUPS,
    OF_HEADS,
    ONE,
    POSITIONS,
    QUERY,
    QUERY_HEADS,
    RESIDUAL,
    SHARED,
    VOCAB,
    Axis,
    Fused,
    Weight,
)
from slimexport.artifacts import BlockSizes, Estimates
from slimexport.errors import BadInputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Architecture:
    """A family with the sizes of one model; `blocks` may differ from block to block."""

    family: Family
    hidden: int
    head_dim: int
    vocab: int
    tied: bool
    blocks: tuple[BlockSizes, ...]
    flags: frozenset[str]  # what `Weight.when` may name and is true
    positions: int = 0  # that have a learned embedding
    residual_multiplier: float = 1.0  # of what the output matrices add to the residual
    experts: int = 1
    active_experts: int = 1  # that see a token
    block_flags: tuple[frozenset[str], ...] = ()  # of every block, where blocks are of several kinds
    fixed_axes: Mapping[str, int] = field(default_factory=dict)
    head_axes: Mapping[str, int] = field(default_factory=dict)  # of further axes, entries to each query head

    # ------------------------------------------------------------------------------------------------ construction

    @classmethod
    def from_config(cls, family: Family, config: PreTrainedConfig) -> Architecture:
        """Reads the sizes; raises BadInputError where they contradict each other, or the family refuses them."""
        if why := family.refusal and family.refusal(config):
            raise BadInputError(f"This {family.model_type} model cannot be pruned: {why}.")
        try:
            blocks = tuple(family.sizes_of(c) for c in config.per_layer_config)
        except ValueError as error:
            raise BadInputError(f"{error}.") from error
        fields = {c.lstrip("!") for w in family.block_weights + family.model_weights for c in w.conditions}
        flags = {name for name in fields if getattr(config, name, False)}
        if family.flags is not None:
            flags |= set(family.flags(config))
        # Per block there is one head_dim and, where none is written down, the head count of the dense model.
        explicit = getattr(config, family.head_dim_field, None) if family.head_dim_field else None
        return cls(
            family=family,
            hidden=config.hidden_size,
            head_dim=explicit or config.hidden_size // _dense_heads(family, config),
            vocab=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            blocks=blocks,
            flags=frozenset(flags),
            positions=family.positions(config) if family.positions else 0,
            residual_multiplier=family.residual_multiplier(config) if family.residual_multiplier else 1.0,
            experts=getattr(config, family.experts_field) if family.experts else 1,
            active_experts=config.num_experts_per_tok if family.experts else 1,
            block_flags=_flags_of_blocks(family, config),
            fixed_axes=_fixed_axes(family, config),
            head_axes=family.head_axes(config) if family.head_axes else {},
        )

    def with_blocks(self, blocks: tuple[BlockSizes, ...]) -> Architecture:
        return dataclasses.replace(self, blocks=blocks)

    # -------------------------------------------------------------------------------------------------- the table

    @cached_property
    def by_block(self) -> tuple[Architecture, ...]:
        """This architecture as each block knows it: where blocks are of several kinds, only what is asked of one of
        these says what that block has."""
        if not self.block_flags:
            return (self,) * len(self.blocks)
        return tuple(dataclasses.replace(self, flags=self.flags | own, block_flags=()) for own in self.block_flags)

    def _exists(self, weight: Weight) -> bool:
        return all((c[1:] not in self.flags) if c[0] == "!" else (c in self.flags) for c in weight.conditions)

    def block_weights(self) -> Iterator[Weight]:
        """Weights that a block of this model has."""
        return (w for w in self.family.block_weights if self._exists(w))

    @cached_property
    def has_heads(self) -> bool:
        """Whether this block has heads that can be taken out one by one."""
        return any(w.name == self.family.attention_weight and w.runs_along(QUERY) for w in self.block_weights())

    @cached_property
    def has_channels(self) -> bool:
        """Whether this block has channels of the kind that is pruned."""
        return any(w.name == self.family.ffn_weight and w.runs_along(CHANNELS) for w in self.block_weights())

    @property
    def outputs(self) -> tuple[str, ...]:
        """The modules of this block whose inputs are pruned."""
        heads = (self.family.attention_output,) if self.has_heads else ()
        return heads + ((self.family.ffn_output,) if self.has_channels else ())

    def is_transposed(self, name: str) -> bool:
        """Of the output matrix called `name`: whether it is stored as [in, out]."""
        return next(weight.transposed for weight in self.block_weights() if weight.name == name)

    def axis_size(self, axis: Axis, sizes: BlockSizes | None = None) -> int:
        if isinstance(axis, Fused):
            return sum(self.axis_size(part, sizes) for part in axis.parts)
        fixed = {
            RESIDUAL: self.hidden, HEAD_DIM: self.head_dim, VOCAB: self.vocab, POSITIONS: self.positions,
            EXPERTS: self.experts, ONE: 1, **self.fixed_axes,
        }  # fmt: skip
        if axis in fixed:
            return fixed[axis]
        assert sizes is not None, f"axis {axis} belongs to a block"
        return self.named_sizes(sizes)[axis]

    @property
    def query_axes(self) -> dict[str, int]:
        """Axes that run through the query heads, and the entries that each of these has there."""
        return {QUERY: self.head_dim, GATED_QUERY: 2 * self.head_dim, **self.head_axes}

    def named_sizes(self, sizes: BlockSizes) -> dict[str, int]:
        """Everything that a block's axes and its modules' attributes can be as long as."""
        return {
            **{axis: sizes.query_heads * width for axis, width in self.query_axes.items()},
            KEY_VALUE: sizes.kv_groups * self.head_dim,
            CHANNELS: sizes.channels,
            QUERY_HEADS: sizes.query_heads,
            KV_GROUPS: sizes.kv_groups,
            "heads_per_group": sizes.heads_per_group,
        }

    def block_shapes(self, sizes: BlockSizes) -> dict[str, tuple[int, ...]]:
        return {w.name: tuple(self.axis_size(a, sizes) for a in w.axes) for w in self.block_weights()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every stored tensor (a tied lm_head is not stored)."""
        shapes = {
            w.name: tuple(self.axis_size(a) for a in w.axes) for w in self.family.model_weights if self._exists(w)
        }
        for i, (own, sizes) in enumerate(zip(self.by_block, self.blocks, strict=True)):
            for name, shape in own.block_shapes(sizes).items():
                shapes[f"{self.family.blocks}.{i}.{name}"] = shape
        return shapes

    def plain_config_can_say(self, sizes: BlockSizes) -> bool:
        """Whether a config without per-block sizes can say these."""
        if not self.family.channels_of_experts_alone and sizes.channels != self.blocks[0].channels:
            return False
        heads, dense = ((s.kv_groups, s.heads_per_group) for s in (sizes, self.blocks[0]))
        if self.family.guessed and heads != dense:
            return False
        if self.family.head_dim_field is None and sizes.query_heads * self.head_dim != self.hidden:
            return False
        if self.family.kv_groups_field is None and sizes.kv_groups not in (1, sizes.query_heads):
            return False
        return not self.family.heads_divide_hidden or self.hidden % sizes.query_heads == 0

    def legal_heads(self, dense: BlockSizes) -> list[tuple[int, int]]:
        """(KV groups, query heads per group) that a block of sizes `dense` may be left with."""
        if not self.family.heads_prunable or not self.has_heads:
            return [(dense.kv_groups, dense.heads_per_group)]
        return [(g, h) for g in range(1, dense.kv_groups + 1) for h in range(1, dense.heads_per_group + 1)]

    # ---------------------------------------------------------------------------------------------------- counting

    def block_linear_parameters(self, sizes: BlockSizes) -> int:
        """Entries of the block's matrices (q, k, v, o, gate, up, down): what `ratio` is a share of."""
        return self._entries(sizes)

    def linear_parameters(self, blocks: Iterable[BlockSizes]) -> int:
        """Those of all blocks, of these sizes."""
        return sum(own.block_linear_parameters(sizes) for own, sizes in zip(self.by_block, blocks, strict=True))

    def attention_parameters(self, sizes: BlockSizes) -> int:
        """The part of `block_linear_parameters` that runs along heads."""
        return self._entries(sizes, *OF_HEADS)

    def channel_parameters(self) -> int:
        """Matrix entries that one channel of one block costs."""
        return self._entries(BlockSizes(1, 1, 1), CHANNELS)

    def _entries(self, sizes: BlockSizes, *along: str) -> int:
        return sum(
            math.prod(self.axis_size(axis, sizes) for axis in weight.axes)
            for weight in self.block_weights()
            if weight.is_matrix and (not along or weight.runs_along(*along))
        )

    def left_dense_parameters(self, sizes: BlockSizes) -> int:
        """Entries of the block's matrices that nothing is taken out of: routers, shared experts, what blocks of
        another kind have."""
        return sum(
            math.prod(self.axis_size(axis, sizes) for axis in weight.axes)
            for weight in self.block_weights()
            if len(weight.axes) > 1 and not weight.is_matrix and not weight.name.endswith("bias")
        )

    def estimates(self, bytes_per_parameter: int) -> Estimates:
        """Sizes, streamed bytes and FLOPs of this architecture, from the table alone."""
        total = sum(math.prod(s) for s in self.shapes().values())
        linear = self.linear_parameters(self.blocks)
        each = list(zip(self.by_block, self.blocks, strict=True))
        left_dense = sum(own.left_dense_parameters(sizes) for own, sizes in each)
        # Of experts a token reads and multiplies those it is sent to.
        idle = sum(sizes.channels * own.channel_parameters() for own, sizes in each)
        idle -= idle * self.active_experts // self.experts
        embedding = self.vocab * self.hidden
        # A decoded token reads every weight once, except the embedding tables, of which it reads one row; a tied
        # table is read as lm_head. FLOPs: two per multiply-add.
        streamed = total - idle - (0 if self.tied else embedding) - self.positions * self.hidden
        cached = self.family.cached or _keys_and_values
        kv = sum(cached(own, sizes) for own, sizes in each if own.has_heads)
        return Estimates(
            parameters=total,
            block_parameters=linear,
            bytes=total * bytes_per_parameter,
            decode_bytes_per_token=streamed * bytes_per_parameter,
            prefill_flops_per_token=2 * (linear + left_dense - idle + embedding),
            kv_cache_bytes_per_token=kv * bytes_per_parameter,
            head_flops=2 * embedding,
        )

    # ----------------------------------------------------------------------------------------------------- slicing

    def axis_index(self, axis: Axis, kept: Kept) -> list[int] | None:
        """Positions along `axis` that stay; None for an axis that is never sliced."""
        if isinstance(axis, Fused):
            return sorted(position for _, positions in self.fused_index(axis, kept) for position in positions)
        if axis == CHANNELS:
            return list(kept.channels)
        if axis in (QUERY_HEADS, KV_GROUPS):
            return list(kept.query_heads if axis == QUERY_HEADS else kept.kv_groups)
        if axis == KEY_VALUE or axis in self.query_axes:
            heads = kept.kv_groups if axis == KEY_VALUE else kept.query_heads
            width = self.query_axes.get(axis, self.head_dim)
            return [h * width + d for h in heads for d in range(width)]
        return None

    def fused_index(self, axis: Fused, kept: Kept) -> list[tuple[str, list[int]]]:
        """(part, the positions of what is kept of it) for every part of a fused axis, ascending in each."""
        found = []
        start = 0
        for part in axis.parts:
            size = self.axis_size(part, kept.of)
            index = self.axis_index(part, kept)
            index = list(range(size)) if index is None else index
            if axis.turns:
                # A turn's share of each part stands together: `size` of them in steps of the whole turn's width.
                turns = self.axis_size(axis.turns, kept.of)
                share, width = size // turns, self.axis_size(axis, kept.of) // turns
                found.append((part, [i // share * width + start + i % share for i in index]))
                start += share
            else:
                found.append((part, [start + i for i in index]))
                start += size
        return found

    def slice_weight(self, weight: Weight, tensor: torch.Tensor, kept: Kept) -> torch.Tensor:
        """`tensor` [axis sizes of the dense block] with only the kept positions, contiguous."""
        import torch

        if weight.is_per_expert and kept.experts > 1:
            one = dataclasses.replace(weight, axes=weight.axes[1:])
            return torch.stack([self.slice_weight(one, part, kept.of_expert(e)) for e, part in enumerate(tensor)])
        for dim, axis in enumerate(weight.axes):
            index = self.axis_index(axis, kept)
            if index is not None and len(index) != tensor.shape[dim]:
                tensor = tensor.index_select(dim, torch.tensor(index, device=tensor.device))
        return tensor.contiguous()

    def _versions(self) -> str:
        """Whose names the table has: another transformers may call its modules differently."""
        wanted = next((r for r in requires("slimexport") or () if r.startswith("transformers")), "transformers")
        return f"The table of {self.family.model_type} is that of {wanted}; installed is {version('transformers')}."

    def check_weights(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Raises BadInputError where the tensors of a checkpoint differ from what its config says."""
        for name, shape in self.shapes().items():
            if name not in shapes:
                raise BadInputError(
                    f"{where}: tensor {name} is missing (the config asks for {list(shape)}). {self._versions()}"
                )
            if tuple(shapes[name]) != shape:
                raise BadInputError(
                    f"{where}: tensor {name} has shape {list(shapes[name])}, but the config asks for {list(shape)}."
                )


def _keys_and_values(own: Architecture, sizes: BlockSizes) -> int:
    """Entries that a token adds to the cache of a block."""
    return 2 * sizes.kv_groups * own.head_dim


def _flags_of_blocks(family: Family, config: Any) -> tuple[frozenset[str], ...]:
    """Nothing where no block has any."""
    if family.block_flags is None:
        return ()
    flags = tuple(frozenset(family.block_flags(config, i)) for i in range(config.num_hidden_layers))
    return flags if any(flags) else ()


def _fixed_axes(family: Family, config: Any) -> dict[str, int]:
    shared = {SHARED: getattr(config, family.shared_channels_field)} if family.shared_channels_field else {}
    return shared | dict(family.fixed_axes(config) if family.fixed_axes else {})


def _dense_heads(family: Family, config: Any) -> int:
    """Query heads where all of them are as wide as hidden size over heads: those of the config outside of its blocks,
    which a checkpoint with sizes per block keeps as they were."""
    return int(config.to_dict()[family.query_heads_field])
