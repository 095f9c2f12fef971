"""GPT-NeoX and Pythia: q, k and v head by head in one matrix."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    KEY_VALUE,
    KV_GROUPS,
    QUERY,
    RESIDUAL,
    Fused,
    linear,
    model_weights,
    norm,
    norms,
    plain_ffn,
)

registry.register("gpt_neox")(
    Family(
        model_type="gpt_neox",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm", bias="always"),
            *linear(
                "attention.query_key_value",
                Fused((QUERY, KEY_VALUE, KEY_VALUE), turns=KV_GROUPS),
                RESIDUAL,
                "attention_bias",
            ),
            *linear("attention.dense", RESIDUAL, QUERY, "attention_bias"),
            *plain_ffn("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", bias="always"),
        ),
        model_weights=model_weights("gpt_neox.embed_in", *norm("gpt_neox.final_layer_norm", bias="always")),
        attention="attention",
        attention_output="attention.dense",
        ffn_output="mlp.dense_4h_to_h",
        ffn_factors=("mlp.dense_h_to_4h",),
        final_norm="gpt_neox.final_layer_norm",
        decoder="gpt_neox",
        blocks="gpt_neox.layers",
        attributes={},
        kv_groups_field=None,
        head_dim_field=None,
    )
)
