"""Granite with sliding windows: attention has a sink in every query head."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, QUERY_HEADS, Weight, gated_decoder_block

registry.register("granite_swa")(
    Family(
        model_type="granite_swa",
        eager=True,
        block_weights=(
            *gated_decoder_block(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
            Weight("self_attn.sinks", (QUERY_HEADS,)),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        residual_multiplier=lambda config: config.residual_multiplier,
    )
)
