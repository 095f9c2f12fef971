"""Persimmon: q, k and v head by head in one matrix, q and k normed per head."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    HEAD_DIM,
    KEY_VALUE,
    KV_GROUPS,
    QUERY,
    RESIDUAL,
    Fused,
    Weight,
    linear,
    model_weights,
    norm,
    norms,
    plain_ffn,
)

registry.register("persimmon")(
    Family(
        model_type="persimmon",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm", bias="always"),
            *linear(
                "self_attn.query_key_value", Fused((QUERY, KEY_VALUE, KEY_VALUE), turns=KV_GROUPS), RESIDUAL, "always"
            ),
            *linear("self_attn.dense", RESIDUAL, QUERY, "always"),
            *(
                Weight(f"self_attn.{name}.{kind}", (HEAD_DIM,), "qk_layernorm")
                for name in ("q_layernorm", "k_layernorm")
                for kind in ("weight", "bias")
            ),
            *plain_ffn("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", bias="always"),
        ),
        model_weights=model_weights("model.embed_tokens", *norm("model.final_layernorm", bias="always")),
        attention_output="self_attn.dense",
        ffn_output="mlp.dense_4h_to_h",
        ffn_factors=("mlp.dense_h_to_4h",),
        final_norm="model.final_layernorm",
        attributes={"self_attn.num_heads": "query_heads"},
        kv_groups_field=None,
        head_dim_field=None,
    )
)
