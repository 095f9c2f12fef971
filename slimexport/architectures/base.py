"""An architecture is a table of its weights whose axes are named; everything about sizes follows from it.

A family (llama, qwen3, ...) is data: which weights a block has, along which axes they run, and what its modules and
config fields are called. `Architecture` is a family with the sizes of one model. From the table follow parameter,
byte and FLOP counts, the shapes of every checkpoint, and how each weight is sliced when heads and channels go, with or
without modules in memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimexport.artifacts import BlockSizes, Estimates
from slimexport.errors import BadInputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

RESIDUAL = "residual"
QUERY = "query"  # query heads x head_dim
KEY_VALUE = "key_value"  # KV groups x head_dim
CHANNELS = "channels"
HEAD_DIM = "head_dim"  # norms over a head: the same for every head, never sliced
VOCAB = "vocab"


@dataclass(frozen=True)
class Weight:
    """One tensor. `when` names the config field that must be true for it to exist ("!x": must be false)."""

    name: str
    axes: tuple[str, ...]
    when: str | None = None


@dataclass(frozen=True)
class Family:
    """What all models of one `model_type` share. Names of block weights and modules are relative to the block."""

    model_type: str
    block_weights: tuple[Weight, ...]
    model_weights: tuple[Weight, ...]
    attention: str = "self_attn"
    attention_output: str = "self_attn.o_proj"
    ffn_output: str = "mlp.down_proj"
    ffn_factors: tuple[str, ...] = ("mlp.up_proj", "mlp.gate_proj")  # what makes the inputs of ffn_output, one by one
    final_norm: str | None = "model.norm"  # logits grow in proportion to its weight; None: they do not
    decoder: str = "model"  # the submodule that holds embedding, blocks and final norm
    blocks: str = "model.layers"
    # Llama's config refuses head counts that do not divide hidden_size, whatever head_dim says (transformers 46211).
    heads_divide_hidden: bool = False
    query_heads_field: str = "num_attention_heads"
    kv_groups_field: str = "num_key_value_heads"
    channels_field: str = "intermediate_size"

    def config_fields(self, sizes: BlockSizes) -> dict[str, int]:
        """Config fields that say `sizes`, for a block or for the whole model."""
        return {
            self.query_heads_field: sizes.query_heads,
            self.kv_groups_field: sizes.kv_groups,
            self.channels_field: sizes.channels,
        }


@dataclass(frozen=True)
class Kept:
    """Indices that stay in one block, ascending, in the dense numbering of that block."""

    kv_groups: tuple[int, ...]
    query_heads: tuple[int, ...]
    channels: tuple[int, ...]

    @classmethod
    def all(cls, sizes: BlockSizes) -> Kept:
        return cls(tuple(range(sizes.kv_groups)), tuple(range(sizes.query_heads)), tuple(range(sizes.channels)))

    @property
    def sizes(self) -> BlockSizes:
        return BlockSizes(len(self.kv_groups), len(self.query_heads) // len(self.kv_groups), len(self.channels))


@dataclass(frozen=True)
class Architecture:
    """A family with the sizes of one model; `blocks` may differ from block to block."""

    family: Family
    hidden: int
    head_dim: int
    vocab: int
    tied: bool
    blocks: tuple[BlockSizes, ...]
    flags: frozenset[str]  # config fields named by `Weight.when` that are true

    # ------------------------------------------------------------------------------------------------ construction

    @classmethod
    def from_config(cls, family: Family, config: PreTrainedConfig) -> Architecture:
        """Reads the sizes; raises BadInputError where they contradict each other."""
        blocks = tuple(_block_sizes(family, c) for c in config.per_layer_config)
        names = {w.when.lstrip("!") for w in family.block_weights + family.model_weights if w.when}
        heads = blocks[0].query_heads
        return cls(
            family=family,
            hidden=config.hidden_size,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            blocks=blocks,
            flags=frozenset(name for name in names if getattr(config, name, False)),
        )

    def with_blocks(self, blocks: tuple[BlockSizes, ...]) -> Architecture:
        return dataclasses.replace(self, blocks=blocks)

    # -------------------------------------------------------------------------------------------------- the table

    def _exists(self, weight: Weight) -> bool:
        if weight.when is None:
            return True
        if weight.when.startswith("!"):
            return weight.when[1:] not in self.flags
        return weight.when in self.flags

    def block_weights(self) -> Iterator[Weight]:
        """Weights that a block of this model has."""
        return (w for w in self.family.block_weights if self._exists(w))

    def axis_size(self, axis: str, sizes: BlockSizes | None = None) -> int:
        fixed = {RESIDUAL: self.hidden, HEAD_DIM: self.head_dim, VOCAB: self.vocab}
        if axis in fixed:
            return fixed[axis]
        assert sizes is not None, f"axis {axis} belongs to a block"
        return {
            QUERY: sizes.query_heads * self.head_dim,
            KEY_VALUE: sizes.kv_groups * self.head_dim,
            CHANNELS: sizes.channels,
        }[axis]

    def block_shapes(self, sizes: BlockSizes) -> dict[str, tuple[int, ...]]:
        return {w.name: tuple(self.axis_size(a, sizes) for a in w.axes) for w in self.block_weights()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every stored tensor (a tied lm_head is not stored)."""
        shapes = {
            w.name: tuple(self.axis_size(a) for a in w.axes) for w in self.family.model_weights if self._exists(w)
        }
        for i, sizes in enumerate(self.blocks):
            for name, shape in self.block_shapes(sizes).items():
                shapes[f"{self.family.blocks}.{i}.{name}"] = shape
        return shapes

    def plain_config_can_say(self, sizes: BlockSizes) -> bool:
        """Whether a config without per-block sizes accepts this head count."""
        return not self.family.heads_divide_hidden or self.hidden % sizes.query_heads == 0

    # ---------------------------------------------------------------------------------------------------- counting

    def block_linear_parameters(self, sizes: BlockSizes) -> int:
        """Entries of the block's matrices (q, k, v, o, gate, up, down): what `ratio` is a share of."""
        return sum(math.prod(s) for s in self.block_shapes(sizes).values() if len(s) == 2)

    def attention_parameters(self, sizes: BlockSizes) -> int:
        """The part of `block_linear_parameters` that runs along heads."""
        names = {w.name for w in self.block_weights() if {QUERY, KEY_VALUE} & set(w.axes)}
        return sum(math.prod(s) for n, s in self.block_shapes(sizes).items() if n in names and len(s) == 2)

    def channel_parameters(self) -> int:
        """Matrix entries that one channel of one block costs."""
        one = BlockSizes(1, 1, 1)
        return sum(
            math.prod(s) for w, s in zip(self.block_weights(), self.block_shapes(one).values(), strict=True)
            if CHANNELS in w.axes and len(s) == 2
        )  # fmt: skip

    def estimates(self, bytes_per_parameter: int) -> Estimates:
        """Sizes, streamed bytes and FLOPs of this architecture, from the table alone."""
        total = sum(math.prod(s) for s in self.shapes().values())
        linear = sum(self.block_linear_parameters(s) for s in self.blocks)
        embedding = self.vocab * self.hidden
        # A decoded token reads every weight once, except the embedding table, of which it reads one row; a tied
        # table is read as lm_head. FLOPs: two per multiply-add.
        streamed = total - (0 if self.tied else embedding)
        kv = sum(2 * s.kv_groups * self.head_dim for s in self.blocks)
        return Estimates(
            parameters=total,
            block_parameters=linear,
            bytes=total * bytes_per_parameter,
            decode_bytes_per_token=streamed * bytes_per_parameter,
            prefill_flops_per_token=2 * (linear + embedding),
            kv_cache_bytes_per_token=kv * bytes_per_parameter,
        )

    # ----------------------------------------------------------------------------------------------------- slicing

    def axis_index(self, axis: str, kept: Kept) -> list[int] | None:
        """Positions along `axis` that stay; None for an axis that is never sliced."""
        if axis == CHANNELS:
            return list(kept.channels)
        if axis in (QUERY, KEY_VALUE):
            heads = kept.query_heads if axis == QUERY else kept.kv_groups
            return [h * self.head_dim + d for h in heads for d in range(self.head_dim)]
        return None

    def slice_weight(self, weight: Weight, tensor: torch.Tensor, kept: Kept) -> torch.Tensor:
        """`tensor` [axis sizes of the dense block] with only the kept positions, contiguous."""
        import torch

        for dim, axis in enumerate(weight.axes):
            index = self.axis_index(axis, kept)
            if index is not None and len(index) != tensor.shape[dim]:
                tensor = tensor.index_select(dim, torch.tensor(index, device=tensor.device))
        return tensor.contiguous()

    def check_weights(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Raises BadInputError where the tensors of a checkpoint differ from what its config says."""
        for name, shape in self.shapes().items():
            if name not in shapes:
                raise BadInputError(f"{where}: tensor {name} is missing (the config asks for {list(shape)}).")
            if tuple(shapes[name]) != shape:
                raise BadInputError(
                    f"{where}: tensor {name} has shape {list(shapes[name])}, but the config asks for {list(shape)}."
                )


def _block_sizes(family: Family, config: Any) -> BlockSizes:
    heads = getattr(config, family.query_heads_field)
    groups = getattr(config, family.kv_groups_field, None) or heads
    if heads % groups:
        raise BadInputError(
            f"{family.query_heads_field} {heads} is not a multiple of {family.kv_groups_field} {groups}."
        )
    return BlockSizes(groups, heads // groups, getattr(config, family.channels_field))


# Tables that several families share --------------------------------------------------------------------------------


def gated_decoder_block(
    *, qkv_bias: str | None, o_bias: str | None, mlp_bias: str | None, qk_norm: bool = False
) -> tuple[Weight, ...]:
    """The block of Llama and its relatives: RMSNorm, separate q/k/v/o, gate/up/down.

    Each bias argument is None (never), "always", or the config field that decides.
    """

    def bias(name: str, axis: str, when: str | None) -> tuple[Weight, ...]:
        return () if when is None else (Weight(name, (axis,), None if when == "always" else when),)

    weights: tuple[Weight, ...] = (Weight("input_layernorm.weight", (RESIDUAL,)),)
    for name, axis in (("q", QUERY), ("k", KEY_VALUE), ("v", KEY_VALUE)):
        weights += (Weight(f"self_attn.{name}_proj.weight", (axis, RESIDUAL)),)
        weights += bias(f"self_attn.{name}_proj.bias", axis, qkv_bias)
    weights += (Weight("self_attn.o_proj.weight", (RESIDUAL, QUERY)), *bias("self_attn.o_proj.bias", RESIDUAL, o_bias))
    if qk_norm:
        weights += (Weight("self_attn.q_norm.weight", (HEAD_DIM,)), Weight("self_attn.k_norm.weight", (HEAD_DIM,)))
    weights += (Weight("post_attention_layernorm.weight", (RESIDUAL,)),)
    for name in ("gate", "up"):
        weights += (Weight(f"mlp.{name}_proj.weight", (CHANNELS, RESIDUAL)),)
        weights += bias(f"mlp.{name}_proj.bias", CHANNELS, mlp_bias)
    return (
        *weights,
        Weight("mlp.down_proj.weight", (RESIDUAL, CHANNELS)),
        *bias("mlp.down_proj.bias", RESIDUAL, mlp_bias),
    )


DECODER_MODEL_WEIGHTS = (
    Weight("model.embed_tokens.weight", (VOCAB, RESIDUAL)),
    Weight("model.norm.weight", (RESIDUAL,)),
    Weight("lm_head.weight", (VOCAB, RESIDUAL), "!tie_word_embeddings"),
)
