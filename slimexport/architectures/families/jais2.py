"""Jais 2: Llama with norms that have biases, and an FFN without gate."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import attention_weights, model_weights, norm, norms, plain_ffn

registry.register("jais2")(
    Family(
        model_type="jais2",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm", bias="always"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            *plain_ffn("mlp.up_proj", "mlp.down_proj", bias="mlp_bias"),
        ),
        model_weights=model_weights("model.embed_tokens", *norm("model.norm", bias="always")),
        ffn_factors=("mlp.up_proj",),
        heads_divide_hidden=True,
    )
)
