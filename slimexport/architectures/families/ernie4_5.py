"""ERNIE 4.5 (dense)."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, gated_decoder_block

registry.register("ernie4_5")(
    Family(
        model_type="ernie4_5",
        block_weights=gated_decoder_block(qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias"),
        model_weights=DECODER_MODEL_WEIGHTS,
    )
)
