"""dots.llm1: GLM 4.5's blocks, with q and k always normed and a bias on the attention's output."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.glm4_moe import EXPERTS_OR_DENSE
from slimexport.architectures.families.glm4_moe import FAMILY as GLM4_MOE
from slimexport.architectures.weights import attention_weights, norms

registry.register("dots1")(
    replace(
        GLM4_MOE,
        model_type="dots1",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias", head_norms=("q_norm", "k_norm")),
            *EXPERTS_OR_DENSE,
        ),
    )
)
