"""DeepSeek V2: V3's blocks, with another router and biases in the FFNs."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.deepseek_v3 import FAMILY as DEEPSEEK_V3
from slimexport.architectures.latent import latent_attention_weights
from slimexport.architectures.weights import SHARED, gated_ffn, mixed_ffn, norms

registry.register("deepseek_v2")(
    replace(
        DEEPSEEK_V3,
        model_type="deepseek_v2",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *latent_attention_weights(),
            *mixed_ffn(*gated_ffn("mlp.shared_experts", bias="mlp_bias", along=SHARED), bias="mlp_bias"),
        ),
        heads_divide_hidden=True,
    )
)
