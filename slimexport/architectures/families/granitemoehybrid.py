"""Granite 4 where every block has attention and none has experts."""

from typing import Any

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    CHANNELS,
    DECODER_MODEL_WEIGHTS,
    RESIDUAL,
    Fused,
    attention_weights,
    linear,
    norms,
)


def _refusal(config: Any) -> str | None:
    if set(config.layer_types) != {"full_attention"}:
        return "some of its blocks have a state space instead of attention"
    return "it has experts and an FFN beside them" if config.num_local_experts else None


registry.register("granitemoehybrid")(
    Family(
        model_type="granitemoehybrid",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            *linear("shared_mlp.input_linear", Fused((CHANNELS, CHANNELS)), RESIDUAL),
            *linear("shared_mlp.output_linear", RESIDUAL, CHANNELS),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_output="shared_mlp.output_linear",
        ffn_factors=("shared_mlp.input_linear",),
        channels_field="shared_intermediate_size",
        residual_multiplier=lambda config: config.residual_multiplier,
        refusal=_refusal,
    )
)
