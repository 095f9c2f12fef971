"""Qwen 3: q and k are normed per head."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, gated_decoder_block

registry.register("qwen3")(
    Family(
        model_type="qwen3",
        block_weights=gated_decoder_block(
            qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias=None, qk_norm=True
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
    )
)
