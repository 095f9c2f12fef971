"""Qwen 3 Next: Qwen 3.5's blocks with experts; the one that sees every token is left dense."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from slimexport.architectures import registry
from slimexport.architectures.families.qwen2_moe import dense_blocks
from slimexport.architectures.families.qwen3_5_text import FAMILY as QWEN3_5
from slimexport.architectures.families.qwen3_5_text import GATED_ATTENTION, VALUES, axes, linear_attention
from slimexport.architectures.weights import (
    DENSE_CHANNELS,
    ONE,
    RESIDUAL,
    SHARED,
    Weight,
    gated_ffn,
    linear,
    mixed_ffn,
    norms,
    where,
)

ALL, BOTH = "linear_inputs", "linear_value_heads_twice"  # keys, queries, values and gates; two numbers a value head


def flags(config: Any, block: int) -> Iterator[str]:
    yield config.layer_types[block]
    yield from dense_blocks(config, block)


def all_axes(config: Any) -> dict[str, int]:
    known = axes(config)
    widths = {ALL: 2 * config.linear_num_key_heads * config.linear_key_head_dim + 2 * known[VALUES]}
    return known | widths | {BOTH: 2 * config.linear_num_value_heads, DENSE_CHANNELS: config.intermediate_size}


registry.register("qwen3_next")(
    replace(
        QWEN3_5,
        model_type="qwen3_next",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *GATED_ATTENTION,
            *where(
                "linear_attention",
                linear_attention(
                    *linear("linear_attn.in_proj_qkvz", ALL, RESIDUAL),
                    *linear("linear_attn.in_proj_ba", BOTH, RESIDUAL),
                ),
            ),
            *mixed_ffn(
                *gated_ffn("mlp.shared_expert", along=SHARED), Weight("mlp.shared_expert_gate.weight", (ONE, RESIDUAL))
            ),
        ),
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
        channels_field="moe_intermediate_size",
        shared_channels_field="shared_expert_intermediate_size",
        block_flags=flags,
        fixed_axes=all_axes,
        without_channels="their FFN has no experts",
    )
)
