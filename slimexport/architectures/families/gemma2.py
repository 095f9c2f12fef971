"""Gemma 2: norms before and after both parts of a block, soft caps on scores and logits."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, attention_weights, gated_ffn, norms

GEMMA2 = registry.register("gemma2")(
    Family(
        model_type="gemma2",
        eager=True,
        block_weights=(
            *norms(
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            *gated_ffn(),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        final_norm_offset=1.0,
        softcap_field="final_logit_softcapping",
        outputs_normed=True,
        heads_divide_hidden=True,
    )
)
