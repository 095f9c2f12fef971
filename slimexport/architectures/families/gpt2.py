"""GPT-2: Conv1D, that is matrices stored as [in, out]; q, k and v in one."""

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

GPT2 = registry.register("gpt2")(
    Family(
        model_type="gpt2",
        block_weights=(
            *norms("ln_1", "ln_2", bias="always"),
            *linear("attn.c_attn", Fused((QUERY, KEY_VALUE, KEY_VALUE)), RESIDUAL, "always", transposed=True),
            *linear("attn.c_proj", RESIDUAL, QUERY, "always", transposed=True),
            *plain_ffn("mlp.c_fc", "mlp.c_proj", bias="always", transposed=True),
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
        attributes={"attn.num_heads": "query_heads", "attn.split_size": "query"},
        query_heads_field="n_head",
        kv_groups_field=None,
        channels_field="n_inner",
        head_dim_field=None,
        positions=lambda config: config.n_positions,
        refusal=lambda config: "it has cross attention" if config.add_cross_attention else None,
    )
)
