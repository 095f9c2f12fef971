"""OLMo 2: outputs are normed, and q and k over all heads together."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    DECODER_MODEL_WEIGHTS,
    KEY_VALUE,
    QUERY,
    Weight,
    attention_weights,
    gated_ffn,
    norms,
)

OLMO2 = registry.register("olmo2")(
    Family(
        model_type="olmo2",
        block_weights=(
            *norms("post_attention_layernorm", "post_feedforward_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            Weight("self_attn.q_norm.weight", (QUERY,)),
            Weight("self_attn.k_norm.weight", (KEY_VALUE,)),
            *gated_ffn(),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        outputs_normed=True,
        heads_prunable=False,
    )
)
