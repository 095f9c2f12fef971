"""Gemma 3, the text model."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, attention_weights, gated_ffn, norms

registry.register("gemma3_text")(
    Family(
        model_type="gemma3_text",
        block_weights=(
            *norms(
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias", head_norms=("q_norm", "k_norm")),
            *gated_ffn(),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        final_norm_offset=1.0,
        softcap_field="final_logit_softcapping",
        outputs_normed=True,
    )
)
