"""dots.llm1: GLM 4.5's blocks, with q and k always normed and a bias on the attention's output."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.glm4_moe import FAMILY as GLM4_MOE
from slimexport.architectures.weights import EXPERTS, SHARED, Weight, attention_weights, gated_ffn, mixed_ffn, norms

registry.register("dots1")(
    replace(
        GLM4_MOE,
        model_type="dots1",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias", head_norms=("q_norm", "k_norm")),
            *mixed_ffn(
                *gated_ffn("mlp.shared_experts", along=SHARED), Weight("mlp.gate.e_score_correction_bias", (EXPERTS,))
            ),
        ),
    )
)
