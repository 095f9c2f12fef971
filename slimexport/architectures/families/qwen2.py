"""Qwen 2 and 2.5: biases on q, k and v only."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, gated_decoder_block

registry.register("qwen2")(
    Family(
        model_type="qwen2",
        block_weights=gated_decoder_block(qkv_bias="always", o_bias=None, mlp_bias=None),
        model_weights=DECODER_MODEL_WEIGHTS,
    )
)
