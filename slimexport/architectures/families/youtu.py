"""Youtu-LLM: Llama's block with attention by latents."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.latent import LATENT, latent_attention_weights, ranks
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, gated_ffn, norms

FAMILY = registry.register("youtu")(
    Family(
        model_type="youtu",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *latent_attention_weights(),
            *gated_ffn(bias="mlp_bias"),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        fixed_axes=ranks,
        **LATENT,
    )
)
