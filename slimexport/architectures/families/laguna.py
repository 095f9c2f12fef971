"""Laguna: attention's output is gated by head; experts behind a few blocks without."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    DECODER_MODEL_WEIGHTS,
    DENSE,
    DENSE_CHANNELS,
    EXPERTS,
    QUERY,
    QUERY_HEADS,
    RESIDUAL,
    SHARED,
    Weight,
    attention_weights,
    gated_ffn,
    linear,
    mixed_ffn,
    norms,
    where,
)

BY_HEAD = "gated by head"

registry.register("laguna")(
    Family(
        model_type="laguna",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias", head_norms=("q_norm", "k_norm")),
            *where(BY_HEAD, linear("self_attn.g_proj", QUERY_HEADS, RESIDUAL)),
            *where(f"!{BY_HEAD}", linear("self_attn.g_proj", QUERY, RESIDUAL)),
            *mixed_ffn(
                *gated_ffn("mlp.shared_experts", along=SHARED), Weight("mlp.gate.e_score_correction_bias", (EXPERTS,))
            ),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
        channels_field="moe_intermediate_size",
        shared_channels_field="shared_expert_intermediate_size",
        flags=lambda config: [BY_HEAD] if config.gating in (True, "per-head") else [],
        block_flags=lambda config, block: [DENSE] if config.mlp_layer_types[block] != "sparse" else [],
        fixed_axes=lambda config: {DENSE_CHANNELS: config.intermediate_size},
        attributes={"self_attn.num_heads": "query_heads", "self_attn.num_key_value_groups": "heads_per_group"},
        without_channels="their FFN has no experts",
        guessed=True,  # the config says the heads of every block in a list of its own
        refusal=lambda config: (
            "its blocks have different numbers of heads"
            if set(config.num_attention_heads_per_layer) != {config.num_attention_heads}
            else None
        ),
    )
)
