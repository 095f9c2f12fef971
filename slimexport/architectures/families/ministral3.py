"""Ministral 3."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, gated_decoder_block

registry.register("ministral3")(
    Family(
        model_type="ministral3",
        block_weights=gated_decoder_block(qkv_bias=None, o_bias=None, mlp_bias=None),
        model_weights=DECODER_MODEL_WEIGHTS,
    )
)
