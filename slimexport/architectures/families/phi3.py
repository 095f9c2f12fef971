"""Phi-3 and Phi-4-mini: q, k and v in one matrix, gate and up in another."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    CHANNELS,
    DECODER_MODEL_WEIGHTS,
    KEY_VALUE,
    QUERY,
    RESIDUAL,
    Fused,
    linear,
    norms,
)

registry.register("phi3")(
    Family(
        model_type="phi3",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *linear("self_attn.qkv_proj", Fused((QUERY, KEY_VALUE, KEY_VALUE)), RESIDUAL),
            *linear("self_attn.o_proj", RESIDUAL, QUERY),
            *linear("mlp.gate_up_proj", Fused((CHANNELS, CHANNELS)), RESIDUAL),
            *linear("mlp.down_proj", RESIDUAL, CHANNELS),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_factors=("mlp.gate_up_proj",),
        attributes={
            "self_attn.num_key_value_heads": "kv_groups",
            "self_attn.num_key_value_groups": "heads_per_group",
        },
        reads_config=("self_attn",),
    )
)
