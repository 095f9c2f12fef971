"""Helium: the output of attention is as wide as the residual, whatever head_dim says."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, gated_decoder_block

registry.register("helium")(
    Family(
        model_type="helium",
        block_weights=gated_decoder_block(qkv_bias="attention_bias", o_bias=None, mlp_bias="mlp_bias"),
        model_weights=DECODER_MODEL_WEIGHTS,
        head_dim_field=None,
    )
)
