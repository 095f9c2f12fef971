"""FlexOlmo: OLMo 2 with experts."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.olmo2 import OLMO2
from slimexport.architectures.weights import KEY_VALUE, QUERY, Weight, attention_weights, expert_ffn, norms

registry.register("flex_olmo")(
    replace(
        OLMO2,
        model_type="flex_olmo",
        block_weights=(
            *norms("post_attention_layernorm", "post_feedforward_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            Weight("self_attn.q_norm.weight", (QUERY,)),
            Weight("self_attn.k_norm.weight", (KEY_VALUE,)),
            *expert_ffn("mlp.experts", "mlp.gate"),
        ),
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
    )
)
