"""Code World Model: blocks with and without sliding window."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, gated_decoder_block

registry.register("cwm")(
    Family(
        model_type="cwm",
        block_weights=gated_decoder_block(qkv_bias=None, o_bias=None, mlp_bias="mlp_bias"),
        model_weights=DECODER_MODEL_WEIGHTS,
        heads_divide_hidden=True,
    )
)
