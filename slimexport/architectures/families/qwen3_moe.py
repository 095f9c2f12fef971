"""Qwen 3 with experts: no shared one, q and k normed."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.qwen2_moe import FAMILY as QWEN2_MOE
from slimexport.architectures.weights import attention_weights, mixed_ffn, norms

registry.register("qwen3_moe")(
    replace(
        QWEN2_MOE,
        model_type="qwen3_moe",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias", head_norms=("q_norm", "k_norm")),
            *mixed_ffn(),
        ),
        shared_channels_field=None,
    )
)
