"""DeepSeek V3 and R1, Kimi K2: attention by latents, GLM 4.5's experts."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.glm4_moe import EXPERTS_OR_DENSE, axes
from slimexport.architectures.families.glm4_moe import FAMILY as GLM4_MOE
from slimexport.architectures.latent import LATENT, latent_attention_weights, ranks
from slimexport.architectures.weights import norms

FAMILY = registry.register("deepseek_v3")(
    replace(
        GLM4_MOE,
        model_type="deepseek_v3",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *latent_attention_weights(),
            *EXPERTS_OR_DENSE,
        ),
        fixed_axes=lambda config: ranks(config) | axes(config),
        **LATENT,
    )
)
