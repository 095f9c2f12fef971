"""Granite with experts."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, attention_weights, expert_ffn, norms

registry.register("granitemoe")(
    Family(
        model_type="granitemoe",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            *expert_ffn("block_sparse_moe.experts", "block_sparse_moe.router"),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_output="block_sparse_moe.experts",
        ffn_factors=(),
        experts=True,
        experts_field="num_local_experts",
        residual_multiplier=lambda config: config.residual_multiplier,
    )
)
