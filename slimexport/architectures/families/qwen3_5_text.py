"""Qwen 3.5, the text model: linear attention in most blocks, which is left dense, gated attention in the others."""

from collections.abc import Iterator
from typing import Any

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    DECODER_MODEL_WEIGHTS,
    GATED_QUERY,
    ONE,
    RESIDUAL,
    Weight,
    attention_weights,
    gated_ffn,
    linear,
    norms,
    where,
)

# Axes of linear attention: its keys, queries and values together, values, their heads and the width of one, the kernel.
MIXED, VALUES, VALUE_HEADS, VALUE_WIDTH, KERNEL = (
    f"linear_{axis}" for axis in ("mixed", "values", "value_heads", "value_width", "kernel")
)


def axes(config: Any) -> dict[str, int]:
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return {
        MIXED: 2 * keys + values,
        VALUES: values,
        VALUE_HEADS: config.linear_num_value_heads,
        VALUE_WIDTH: config.linear_value_head_dim,
        KERNEL: config.linear_conv_kernel_dim,
    }


def linear_attention(*projections: Weight, prefix: str = "linear_attn") -> Iterator[Weight]:
    """A gated delta net behind `projections`."""
    yield from projections
    yield Weight(f"{prefix}.conv1d.weight", (MIXED, ONE, KERNEL))
    yield Weight(f"{prefix}.dt_bias", (VALUE_HEADS,))
    yield Weight(f"{prefix}.A_log", (VALUE_HEADS,))
    yield Weight(f"{prefix}.norm.weight", (VALUE_WIDTH,))
    yield from linear(f"{prefix}.out_proj", RESIDUAL, VALUES)


GATED_ATTENTION = where(
    "full_attention",
    attention_weights(
        query=GATED_QUERY, qkv_bias="attention_bias", o_bias="attention_bias", head_norms=("q_norm", "k_norm")
    ),
)

FAMILY = registry.register("qwen3_5_text")(
    Family(
        model_type="qwen3_5_text",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *GATED_ATTENTION,
            *where(
                "linear_attention",
                linear_attention(
                    *linear("linear_attn.in_proj_qkv", MIXED, RESIDUAL),
                    *linear("linear_attn.in_proj_z", VALUES, RESIDUAL),
                    *linear("linear_attn.in_proj_b", VALUE_HEADS, RESIDUAL),
                    *linear("linear_attn.in_proj_a", VALUE_HEADS, RESIDUAL),
                ),
            ),
            *gated_ffn(),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        final_norm_offset=1.0,
        block_flags=lambda config, block: (config.layer_types[block],),
        fixed_axes=axes,
        without_heads="they have linear attention",
        no_trace="transformers computes linear attention by a loop whose length is that of the traced text",
    )
)
