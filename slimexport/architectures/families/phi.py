"""Phi-1 to Phi-2: attention and FFN side by side, biases everywhere."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import attention_weights, model_weights, norm, norms, plain_ffn

registry.register("phi")(
    Family(
        model_type="phi",
        block_weights=(
            *norms("input_layernorm", bias="always"),
            *attention_weights(qkv_bias="always", o_bias="always", output="dense"),
            *plain_ffn("mlp.fc1", "mlp.fc2", bias="always"),
        ),
        model_weights=model_weights(
            "model.embed_tokens", *norm("model.final_layernorm", bias="always"), head_bias="always"
        ),
        attention_output="self_attn.dense",
        ffn_output="mlp.fc2",
        ffn_factors=("mlp.fc1",),
        final_norm=None,  # the head has a bias
        refusal=lambda config: "norms of q and k are not known" if config.qk_layernorm else None,
    )
)
