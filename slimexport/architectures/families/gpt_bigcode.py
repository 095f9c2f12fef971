"""StarCoder 1 and SantaCoder: GPT-2 with one KV group for all heads, as a rule."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    KEY_VALUE,
    POSITIONS,
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

registry.register("gpt_bigcode")(
    Family(
        model_type="gpt_bigcode",
        block_weights=(
            *norms("ln_1", "ln_2", bias="always"),
            *linear("attn.c_attn", Fused((QUERY, KEY_VALUE, KEY_VALUE), by_group=True), RESIDUAL, "always"),
            *linear("attn.c_proj", RESIDUAL, QUERY, "always"),
            *plain_ffn("mlp.c_fc", "mlp.c_proj", bias="always"),
        ),
        model_weights=model_weights(
            "transformer.wte",
            Weight("transformer.wpe.weight", (POSITIONS, RESIDUAL)),
            *norm("transformer.ln_f", bias="always"),
        ),
        attention="attn",
        attention_output="attn.c_proj",
        ffn_output="mlp.c_proj",
        ffn_factors=("mlp.c_fc",),
        final_norm="transformer.ln_f",
        decoder="transformer",
        blocks="transformer.h",
        attributes={
            "attn.num_heads": "query_heads",
            "attn.kv_heads": "kv_groups",
            "attn.num_key_value_groups": "heads_per_group",
            "attn.kv_dim": "key_value",
            "attn.embed_dim": "query",
            "attn.split_size": "query",
        },
        query_heads_field="n_head",
        kv_groups_field=None,
        kv_groups=lambda config: 1 if config.multi_query else config.n_head,
        channels_field="n_inner",
        head_dim_field=None,
        positions=lambda config: config.n_positions,
        refusal=lambda config: "it has cross attention" if config.add_cross_attention else None,
    )
)
