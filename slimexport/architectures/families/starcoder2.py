"""StarCoder 2: biases everywhere, an FFN without gate."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import attention_weights, model_weights, norm, norms, plain_ffn

registry.register("starcoder2")(
    Family(
        model_type="starcoder2",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm", bias="always"),
            *attention_weights(qkv_bias="use_bias", o_bias="use_bias"),
            *plain_ffn("mlp.c_fc", "mlp.c_proj", bias="use_bias"),
        ),
        model_weights=model_weights("model.embed_tokens", *norm("model.norm", bias="always")),
        ffn_output="mlp.c_proj",
        ffn_factors=("mlp.c_fc",),
    )
)
