"""Arcee AFM: Llama with an FFN without gate."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, attention_weights, norms, plain_ffn

registry.register("arcee")(
    Family(
        model_type="arcee",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            *plain_ffn("mlp.up_proj", "mlp.down_proj", bias="mlp_bias"),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_factors=("mlp.up_proj",),
    )
)
