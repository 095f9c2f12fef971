"""Cohere 2 with experts in most blocks."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    DECODER_MODEL_WEIGHTS,
    DENSE,
    DENSE_CHANNELS,
    SHARED,
    attention_weights,
    gated_ffn,
    mixed_ffn,
    norms,
    where,
)

registry.register("cohere2_moe")(
    Family(
        model_type="cohere2_moe",
        block_weights=(
            *norms("input_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            *mixed_ffn(*where("num_shared_experts", gated_ffn("mlp.shared_experts", along=SHARED))),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
        channels_of_experts_alone=False,
        block_flags=lambda config, block: [DENSE] if config.mlp_layer_types[block] == "dense" else [],
        fixed_axes=lambda config: {
            DENSE_CHANNELS: config.prefix_dense_intermediate_size or 0,
            SHARED: config.to_dict()["intermediate_size"] * config.num_shared_experts,
        },
        without_channels="their FFN has no experts",
    )
)
