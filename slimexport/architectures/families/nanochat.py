"""nanochat: norms without weights, an FFN without gate."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import attention_weights, model_weights, plain_ffn

registry.register("nanochat")(
    Family(
        model_type="nanochat",
        block_weights=(
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            *plain_ffn("mlp.fc1", "mlp.fc2"),
        ),
        model_weights=model_weights("model.embed_tokens"),
        ffn_output="mlp.fc2",
        ffn_factors=("mlp.fc1",),
        final_norm=None,
        softcap_field="final_logit_softcapping",
    )
)
