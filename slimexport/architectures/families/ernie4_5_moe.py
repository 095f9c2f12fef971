"""ERNIE 4.5 with experts; the shared ones are left dense."""

from collections.abc import Iterator
from typing import Any

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    DENSE,
    DENSE_CHANNELS,
    EXPERTS,
    ONE,
    SHARED,
    Weight,
    attention_weights,
    gated_ffn,
    mixed_ffn,
    model_weights,
    norm,
    norms,
)


def dense_blocks(config: Any, block: int) -> Iterator[str]:
    """As transformers decides it."""
    inside = config.moe_layer_start_index <= block <= config.moe_layer_end_index
    if not inside or (block + 1) % config.moe_layer_interval:
        yield DENSE


registry.register("ernie4_5_moe")(
    Family(
        model_type="ernie4_5_moe",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="use_bias", o_bias="use_bias"),
            *mixed_ffn(
                *gated_ffn("mlp.shared_experts", bias="use_bias", along=SHARED),
                Weight("mlp.gate.moe_statics.e_score_correction_bias", (ONE, EXPERTS)),
                bias="use_bias",
            ),
        ),
        model_weights=model_weights("model.embed_tokens", *norm("model.norm"), head_bias="use_bias"),
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
        experts_field="moe_num_experts",
        channels_field="moe_intermediate_size",
        channels_of_experts_alone=False,
        block_flags=dense_blocks,
        fixed_axes=lambda config: {
            DENSE_CHANNELS: config.intermediate_size,
            SHARED: config.to_dict()["moe_intermediate_size"] * config.moe_num_shared_experts,
        },
        without_channels="their FFN has no experts",
    )
)
