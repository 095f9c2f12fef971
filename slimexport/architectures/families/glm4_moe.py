"""GLM 4.5 and its successors: experts behind a few blocks without, one or more shared ones, which are left dense."""

from typing import Any

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    DECODER_MODEL_WEIGHTS,
    DENSE,
    DENSE_CHANNELS,
    EXPERTS,
    HEAD_DIM,
    SHARED,
    Weight,
    attention_weights,
    gated_ffn,
    mixed_ffn,
    norms,
    where,
)

EXPERTS_OR_DENSE = mixed_ffn(
    *gated_ffn("mlp.shared_experts", along=SHARED), Weight("mlp.gate.e_score_correction_bias", (EXPERTS,))
)


def axes(config: Any) -> dict[str, int]:
    return {
        DENSE_CHANNELS: config.intermediate_size,
        SHARED: config.to_dict()["moe_intermediate_size"] * config.n_shared_experts,
    }


FAMILY = registry.register("glm4_moe")(
    Family(
        model_type="glm4_moe",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="attention_bias"),
            *where("use_qk_norm", [Weight(f"self_attn.{name}.weight", (HEAD_DIM,)) for name in ("q_norm", "k_norm")]),
            *EXPERTS_OR_DENSE,
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
        experts_field="n_routed_experts",
        channels_field="moe_intermediate_size",
        channels_of_experts_alone=False,
        block_flags=lambda config, block: [DENSE] if block < config.first_k_dense_replace else [],
        fixed_axes=axes,
        without_channels="their FFN has no experts",
    )
)
