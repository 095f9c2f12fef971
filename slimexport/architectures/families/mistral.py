"""Mistral 7B and its successors; sliding window or not."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, gated_decoder_block

registry.register("mistral")(
    Family(
        model_type="mistral",
        block_weights=gated_decoder_block(qkv_bias=None, o_bias=None, mlp_bias=None),
        model_weights=DECODER_MODEL_WEIGHTS,
    )
)
