"""GPT-Neo: learned positions, every second block attends to the last tokens only."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    POSITIONS,
    RESIDUAL,
    Weight,
    attention_weights,
    model_weights,
    norm,
    norms,
    plain_ffn,
)

registry.register("gpt_neo")(
    Family(
        model_type="gpt_neo",
        eager=True,
        returns_tuple=True,
        block_weights=(
            *norms("ln_1", "ln_2", bias="always"),
            *attention_weights("attn.attention", o_bias="always", output="out_proj"),
            *plain_ffn("mlp.c_fc", "mlp.c_proj", bias="always"),
        ),
        model_weights=model_weights(
            "transformer.wte",
            Weight("transformer.wpe.weight", (POSITIONS, RESIDUAL)),
            *norm("transformer.ln_f", bias="always"),
        ),
        attention="attn",
        attention_output="attn.attention.out_proj",
        ffn_output="mlp.c_proj",
        ffn_factors=("mlp.c_fc",),
        final_norm="transformer.ln_f",
        decoder="transformer",
        blocks="transformer.h",
        attributes={"attn.attention.num_heads": "query_heads"},
        query_heads_field="num_heads",
        kv_groups_field=None,
        head_dim_field=None,
        positions=lambda config: config.max_position_embeddings,
    )
)
