"""CTRL: computed positions, biases everywhere, an FFN without gate."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import KEY_VALUE, QUERY, RESIDUAL, linear, model_weights, norm, norms, plain_ffn

registry.register("ctrl")(
    Family(
        model_type="ctrl",
        block_weights=(
            *norms("layernorm1", "layernorm2", bias="always"),
            *linear("multi_head_attention.Wq", QUERY, RESIDUAL, "always"),
            *linear("multi_head_attention.Wk", KEY_VALUE, RESIDUAL, "always"),
            *linear("multi_head_attention.Wv", KEY_VALUE, RESIDUAL, "always"),
            *linear("multi_head_attention.dense", RESIDUAL, QUERY, "always"),
            *plain_ffn("ffn.0", "ffn.2", bias="always"),
        ),
        model_weights=model_weights("transformer.w", *norm("transformer.layernorm", bias="always"), head_bias="always"),
        attention="multi_head_attention",
        attention_output="multi_head_attention.dense",
        ffn_output="ffn.2",
        ffn_factors=("ffn.0",),
        final_norm=None,  # the head has a bias
        decoder="transformer",
        blocks="transformer.h",
        attributes={"multi_head_attention.num_heads": "query_heads"},
        query_heads_field="n_head",
        kv_groups_field=None,
        channels_field="dff",
        head_dim_field=None,
    )
)
