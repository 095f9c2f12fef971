"""EXAONE with experts: GLM 4.5's blocks, with q and k normed and no biases."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.glm4_moe import EXPERTS_OR_DENSE
from slimexport.architectures.families.glm4_moe import FAMILY as GLM4_MOE
from slimexport.architectures.weights import (
    DENSE,
    DENSE_CHANNELS,
    SHARED,
    attention_weights,
    norms,
)

registry.register("exaone_moe")(
    replace(
        GLM4_MOE,
        model_type="exaone_moe",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(head_norms=("q_norm", "k_norm")),
            *EXPERTS_OR_DENSE,
        ),
        experts_field="num_experts",
        block_flags=lambda config, block: [DENSE] if config.mlp_layer_types[block] != "sparse" else [],
        fixed_axes=lambda config: {
            DENSE_CHANNELS: config.intermediate_size,
            SHARED: config.to_dict()["moe_intermediate_size"] * config.num_shared_experts,
        },
    )
)
