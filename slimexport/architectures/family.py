"""A family: what all models of one `model_type` share, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from slimexport.architectures.weights import Weight
from slimexport.artifacts import BlockSizes


@dataclass(frozen=True)
class Family:
    """Names of block weights and modules are relative to the block."""

    model_type: str
    block_weights: tuple[Weight, ...]
    model_weights: tuple[Weight, ...]

    # Modules
    attention: str = "self_attn"
    attention_output: str = "self_attn.o_proj"
    ffn_output: str = "mlp.down_proj"
    experts: bool = False  # ffn_output is a module of experts; its weight is called down_proj
    ffn_factors: tuple[str, ...] = ("mlp.up_proj", "mlp.gate_proj")  # what makes the inputs of ffn_output, one by one
    final_norm: str | None = "model.norm"  # logits grow in proportion to its weight; None: they do not
    final_norm_offset: float = 0.0  # what it adds to its weight (Gemma: 1)
    softcap_field: str | None = None  # config field of a soft cap on the logits
    decoder: str = "model"  # the submodule that holds embedding, blocks and final norm
    blocks: str = "model.layers"
    attributes: Mapping[str, str] = field(default_factory=lambda: {"self_attn.num_key_value_groups": "heads_per_group"})
    """Attributes of modules that hold sizes: query_heads, kv_groups, heads_per_group, query, key_value or channels."""
    reads_config: tuple[str, ...] = ()  # modules that look sizes up in their config while they run
    returns_tuple: bool = False  # a block gives (hidden states, ...)
    eager: bool = False  # attention weights of a whole sequence are in memory: its class has nothing else

    # Fields of the config
    query_heads_field: str = "num_attention_heads"
    kv_groups_field: str | None = "num_key_value_heads"
    channels_field: str = "intermediate_size"
    experts_field: str = "num_experts"
    shared_channels_field: str | None = None
    head_dim_field: str | None = "head_dim"
    """Width of what a head gives to the output matrix; None: it is always hidden size / query heads."""
    positions: Callable[[Any], int] | None = None  # config -> rows of the table of learned positions
    channels: Callable[[Any], int] | None = None  # config -> channels, where channels_field does not say it alone
    settled: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a pruned model's config, by which its sizes mean what they say."""
    kv_groups: Callable[[Any], int] | None = None  # config -> groups, where kv_groups_field does not say it alone
    flags: Callable[[Any], Iterable[str]] | None = None  # config -> names for `Weight.when` that are no fields
    block_flags: Callable[[Any, int], Iterable[str]] | None = None  # config, block -> names for `Weight.when` there
    fixed_axes: Callable[[Any], Mapping[str, int]] | None = None  # config -> lengths of axes that are never sliced
    head_axes: Callable[[Any], Mapping[str, int]] | None = None
    """config -> entries of further axes that belong to each query head."""
    cached: Callable[[Any, BlockSizes], int] | None = None
    """Architecture of a block, its sizes -> entries that a token adds to its cache, where these are not keys and values
    of its KV groups."""
    refusal: Callable[[Any], str | None] | None = None  # config -> why a model like this cannot be pruned

    # How the block adds up
    outputs_normed: bool = False  # a norm stands between the output matrices and the residual
    residual_multiplier: Callable[[Any], float] | None = None  # config -> what their outputs are multiplied by
    heads_prunable: bool = True  # False: a norm over all heads together, which would change with their number
    guessed: bool = False  # nobody read whether a config without sizes per block may say other head counts
    # Llama's config refuses head counts that do not divide hidden_size, whatever head_dim says (transformers 46211).
    heads_divide_hidden: bool = False

    no_trace: str = ""  # why its graph cannot be traced, which leaves the builders that write it themselves
    without_heads: str = ""  # what blocks without attention heads have instead
    without_channels: str = ""  # why some blocks have no channels of the kind that is pruned
    channels_of_experts_alone: bool = True  # False: channels_field says the width of a shared expert too

    @property
    def attention_weight(self) -> str:
        return f"{self.attention_output}.weight"

    @property
    def ffn_weight(self) -> str:
        return f"{self.ffn_output}.down_proj" if self.experts else f"{self.ffn_output}.weight"

    def config_fields(self, sizes: BlockSizes) -> dict[str, int]:
        """Config fields that say `sizes`, for a block or for the whole model."""
        fields = {self.query_heads_field: sizes.query_heads, self.channels_field: sizes.channels}
        if self.kv_groups_field is not None:
            fields[self.kv_groups_field] = sizes.kv_groups
        return fields

    def sizes_of(self, config: Any) -> BlockSizes:
        """What the config of a block says. Raises ValueError where query heads are no multiple of KV groups."""
        heads = getattr(config, self.query_heads_field)
        if self.kv_groups is not None:
            groups = self.kv_groups(config)
        else:
            groups = (self.kv_groups_field and getattr(config, self.kv_groups_field, None)) or heads
        if heads % groups:
            raise ValueError(f"{self.query_heads_field} {heads} is not a multiple of {self.kv_groups_field} {groups}")
        channels = self.channels(config) if self.channels else getattr(config, self.channels_field)
        return BlockSizes(groups, heads // groups, channels or 4 * config.hidden_size)


@dataclass(frozen=True)
class Kept:
    """Indices that stay in one block, ascending, in the numbering of a block of sizes `of`. With experts, channels are
    numbered through: those of the first, then those of the second, as many stay in each."""

    kv_groups: tuple[int, ...]
    query_heads: tuple[int, ...]
    channels: tuple[int, ...]
    of: BlockSizes
    experts: int = 1

    @classmethod
    def all(cls, sizes: BlockSizes, experts: int = 1) -> Kept:
        counts = (sizes.kv_groups, sizes.query_heads, sizes.channels * experts)
        groups, heads, channels = (tuple(range(count)) for count in counts)
        return cls(groups, heads, channels, sizes, experts)

    @property
    def sizes(self) -> BlockSizes:
        channels = len(self.channels) // self.experts
        return BlockSizes(len(self.kv_groups), len(self.query_heads) // len(self.kv_groups), channels)

    def of_expert(self, expert: int) -> Kept:
        """With the channels of this one, numbered from 0."""
        count, start = len(self.channels) // self.experts, expert * self.of.channels
        own = self.channels[expert * count : (expert + 1) * count]
        return replace(self, channels=tuple(channel - start for channel in own), experts=1)
