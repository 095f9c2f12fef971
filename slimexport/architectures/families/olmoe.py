"""OLMoE: q and k are normed over all heads together, so that heads stay."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    DECODER_MODEL_WEIGHTS,
    KEY_VALUE,
    QUERY,
    Weight,
    attention_weights,
    expert_ffn,
    norms,
)

registry.register("olmoe")(
    Family(
        model_type="olmoe",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            Weight("self_attn.q_norm.weight", (QUERY,)),
            Weight("self_attn.k_norm.weight", (KEY_VALUE,)),
            *expert_ffn("mlp.experts", "mlp.gate"),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
        head_dim_field=None,
        heads_prunable=False,
    )
)
