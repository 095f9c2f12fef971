"""Gemma 1: norms multiply by one plus their weight."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, gated_decoder_block

registry.register("gemma")(
    Family(
        model_type="gemma",
        block_weights=gated_decoder_block(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias=None),
        model_weights=DECODER_MODEL_WEIGHTS,
        final_norm_offset=1.0,
    )
)
