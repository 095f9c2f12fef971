"""GPT-J: attention and FFN side by side after one norm, a head with a bias."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import attention_weights, model_weights, norm, norms, plain_ffn

registry.register("gptj")(
    Family(
        model_type="gptj",
        block_weights=(
            *norms("ln_1", bias="always"),
            *attention_weights("attn", output="out_proj"),
            *plain_ffn("mlp.fc_in", "mlp.fc_out", bias="always"),
        ),
        model_weights=model_weights("transformer.wte", *norm("transformer.ln_f", bias="always"), head_bias="always"),
        attention="attn",
        attention_output="attn.out_proj",
        ffn_output="mlp.fc_out",
        ffn_factors=("mlp.fc_in",),
        final_norm=None,  # the head has a bias
        decoder="transformer",
        blocks="transformer.h",
        attributes={"attn.num_attention_heads": "query_heads", "attn.embed_dim": "query"},
        query_heads_field="n_head",
        kv_groups_field=None,
        channels_field="n_inner",
        head_dim_field=None,
    )
)
