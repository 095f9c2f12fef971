"""Solar Open: GLM 4.5's experts in every block."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.glm4_moe import FAMILY as GLM4_MOE
from slimexport.architectures.weights import (
    EXPERTS,
    SHARED,
    Weight,
    attention_weights,
    expert_ffn,
    gated_ffn,
    norms,
)

registry.register("solar_open")(
    replace(
        GLM4_MOE,
        model_type="solar_open",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="attention_bias"),
            *expert_ffn("mlp.experts", "mlp.gate"),
            Weight("mlp.gate.e_score_correction_bias", (EXPERTS,)),
            *gated_ffn("mlp.shared_experts", along=SHARED),
        ),
        block_flags=None,
        fixed_axes=lambda config: {SHARED: config.to_dict()["moe_intermediate_size"] * config.n_shared_experts},
    )
)
