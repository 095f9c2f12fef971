"""OLMo 1: norms without weights."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import attention_weights, gated_ffn, model_weights

registry.register("olmo")(
    Family(
        model_type="olmo",
        block_weights=(
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            *gated_ffn(),
        ),
        model_weights=model_weights("model.embed_tokens"),
        final_norm=None,
    )
)
