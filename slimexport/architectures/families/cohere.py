"""Command-R: attention and FFN side by side, q and k normed by a weight of every head."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    DECODER_MODEL_WEIGHTS,
    HEAD_DIM,
    KV_GROUPS,
    QUERY_HEADS,
    Weight,
    attention_weights,
    gated_ffn,
    norms,
)

registry.register("cohere")(
    Family(
        model_type="cohere",
        block_weights=(
            *norms("input_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            Weight("self_attn.q_norm.weight", (QUERY_HEADS, HEAD_DIM), "use_qk_norm"),
            Weight("self_attn.k_norm.weight", (KV_GROUPS, HEAD_DIM), "use_qk_norm"),
            *gated_ffn(),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
    )
)
