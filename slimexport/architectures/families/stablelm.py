"""StableLM: norms with biases, FFN beside attention or after it."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import attention_weights, gated_ffn, model_weights, norm, norms

registry.register("stablelm")(
    Family(
        model_type="stablelm",
        block_weights=(
            *norms("input_layernorm", bias="always"),
            *(replace(w, when="!use_parallel_residual") for w in norm("post_attention_layernorm", bias="always")),
            *attention_weights(qkv_bias="use_qkv_bias"),
            *gated_ffn(),
        ),
        model_weights=model_weights("model.embed_tokens", *norm("model.norm", bias="always")),
        head_dim_field=None,
        attributes={
            "self_attn.num_heads": "query_heads",
            "self_attn.num_key_value_heads": "kv_groups",
            "self_attn.num_key_value_groups": "heads_per_group",
        },
        refusal=lambda config: "each head has norms of its own" if config.qk_layernorm else None,
    )
)
