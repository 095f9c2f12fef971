"""Command-R7B and Command A; the config computes head_dim anew."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, attention_weights, gated_ffn, norms

registry.register("cohere2")(
    Family(
        model_type="cohere2",
        block_weights=(
            *norms("input_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            *gated_ffn(),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        head_dim_field=None,
    )
)
