"""StarCoder 1 and SantaCoder: GPT-2 in Linear layers, with one KV group for all heads, as a rule."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.gpt2 import GPT2
from slimexport.architectures.weights import KEY_VALUE, KV_GROUPS, QUERY, RESIDUAL, Fused, linear, norms, plain_ffn

registry.register("gpt_bigcode")(
    replace(
        GPT2,
        model_type="gpt_bigcode",
        block_weights=(
            *norms("ln_1", "ln_2", bias="always"),
            *linear("attn.c_attn", Fused((QUERY, KEY_VALUE, KEY_VALUE), turns=KV_GROUPS), RESIDUAL, "always"),
            *linear("attn.c_proj", RESIDUAL, QUERY, "always"),
            *plain_ffn("mlp.c_fc", "mlp.c_proj", bias="always"),
        ),
        attributes={
            "attn.num_heads": "query_heads",
            "attn.kv_heads": "kv_groups",
            "attn.num_key_value_groups": "heads_per_group",
            "attn.kv_dim": "key_value",
            "attn.embed_dim": "query",
            "attn.split_size": "query",
        },
        kv_groups=lambda config: 1 if config.multi_query else config.n_head,
    )
)
