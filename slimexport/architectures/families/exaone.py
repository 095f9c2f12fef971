"""EXAONE 3 and 3.5."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, gated_decoder_block

registry.register("exaone")(
    Family(
        model_type="exaone",
        block_weights=gated_decoder_block(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
        model_weights=DECODER_MODEL_WEIGHTS,
        heads_divide_hidden=True,
    )
)
