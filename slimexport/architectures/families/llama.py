"""Llama 1 to 3.x, SmolLM 1 and 2, and the many models that say model_type llama."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, gated_decoder_block

registry.register("llama")(
    Family(
        model_type="llama",
        block_weights=gated_decoder_block(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
        model_weights=DECODER_MODEL_WEIGHTS,
        heads_divide_hidden=True,
    )
)
