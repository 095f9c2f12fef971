"""Phi-3.5-MoE: norms with biases."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import attention_weights, expert_ffn, model_weights, norm, norms

registry.register("phimoe")(
    Family(
        model_type="phimoe",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm", bias="always"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            *expert_ffn("mlp.experts", "mlp.router"),
        ),
        model_weights=model_weights("model.embed_tokens", *norm("model.norm", bias="always"), head_bias="lm_head_bias"),
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
        final_norm=None,  # the head has a bias
        experts_field="num_local_experts",
    )
)
