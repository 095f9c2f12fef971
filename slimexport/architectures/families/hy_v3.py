"""Hunyuan V3: GLM 4.5's blocks, with q and k normed and more biases."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.glm4_moe import FAMILY as GLM4_MOE
from slimexport.architectures.weights import (
    DENSE,
    DENSE_CHANNELS,
    EXPERTS,
    SHARED,
    Weight,
    attention_weights,
    gated_ffn,
    mixed_ffn,
    norms,
)

registry.register("hy_v3")(
    replace(
        GLM4_MOE,
        model_type="hy_v3",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias", head_norms=("q_norm", "k_norm")),
            *mixed_ffn(
                *gated_ffn("mlp.shared_experts", bias="mlp_bias", along=SHARED),
                Weight("mlp.e_score_correction_bias", (EXPERTS,)),
                bias="mlp_bias",
            ),
        ),
        experts_field="num_experts",
        block_flags=lambda config, block: [DENSE] if config.mlp_layer_types[block] != "sparse" else [],
        fixed_axes=lambda config: {
            DENSE_CHANNELS: config.intermediate_size,
            SHARED: config.to_dict()["moe_intermediate_size"] * config.num_shared_experts,
        },
    )
)
