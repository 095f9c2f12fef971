"""Hunyuan (dense)."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, attention_weights, gated_ffn, norms

registry.register("hunyuan_v1_dense")(
    Family(
        model_type="hunyuan_v1_dense",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(
                qkv_bias="attention_bias", o_bias="attention_bias", head_norms=("query_layernorm", "key_layernorm")
            ),
            *gated_ffn(),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
    )
)
