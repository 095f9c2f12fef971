"""Qwen 1.5 and 2 with experts; the one that sees every token is left dense."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    DECODER_MODEL_WEIGHTS,
    ONE,
    RESIDUAL,
    SHARED,
    Weight,
    attention_weights,
    expert_ffn,
    linear,
    norms,
)

registry.register("qwen2_moe")(
    Family(
        model_type="qwen2_moe",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="qkv_bias"),
            *expert_ffn("mlp.experts", "mlp.gate"),
            *linear("mlp.shared_expert.gate_proj", SHARED, RESIDUAL),
            *linear("mlp.shared_expert.up_proj", SHARED, RESIDUAL),
            *linear("mlp.shared_expert.down_proj", RESIDUAL, SHARED),
            Weight("mlp.shared_expert_gate.weight", (ONE, RESIDUAL)),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
        channels_field="moe_intermediate_size",
        shared_channels_field="shared_expert_intermediate_size",
        refusal=lambda config: (
            "some of its blocks have no experts" if config.mlp_only_layers or config.decoder_sparse_step != 1 else None
        ),
    )
)
