"""Granite with experts and an FFN beside them that sees every token; that one is left dense."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    DECODER_MODEL_WEIGHTS,
    RESIDUAL,
    SHARED,
    Fused,
    attention_weights,
    expert_ffn,
    linear,
    norms,
)

GRANITEMOESHARED = registry.register("granitemoeshared")(
    Family(
        model_type="granitemoeshared",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            *expert_ffn("block_sparse_moe.experts", "block_sparse_moe.router"),
            *(
                replace(w, when="shared_intermediate_size")
                for w in (
                    *linear("shared_mlp.input_linear", Fused((SHARED, SHARED)), RESIDUAL),
                    *linear("shared_mlp.output_linear", RESIDUAL, SHARED),
                )
            ),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_output="block_sparse_moe.experts",
        ffn_factors=(),
        experts=True,
        experts_field="num_local_experts",
        shared_channels_field="shared_intermediate_size",
        residual_multiplier=lambda config: config.residual_multiplier,
    )
)
