"""Granite 3 and 4 (dense): what a block adds is multiplied by a constant."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, gated_decoder_block

registry.register("granite")(
    Family(
        model_type="granite",
        block_weights=gated_decoder_block(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
        model_weights=DECODER_MODEL_WEIGHTS,
        residual_multiplier=lambda config: config.residual_multiplier,
    )
)
