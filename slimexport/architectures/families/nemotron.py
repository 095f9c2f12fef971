"""Nemotron and Minitron: an FFN without gate, norms that multiply by one plus their weight."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import attention_weights, model_weights, norm, norms, plain_ffn

registry.register("nemotron")(
    Family(
        model_type="nemotron",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm", bias="always"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            *plain_ffn("mlp.up_proj", "mlp.down_proj", bias="mlp_bias"),
        ),
        model_weights=model_weights("model.embed_tokens", *norm("model.norm", bias="always")),
        ffn_factors=("mlp.up_proj",),
        final_norm_offset=1.0,
        attributes={
            "self_attn.num_heads": "query_heads",
            "self_attn.num_key_value_heads": "kv_groups",
            "self_attn.num_key_value_groups": "heads_per_group",
        },
    )
)
