"""GLM-4 (0414 before it was called glm4): gate and up in one matrix."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    CHANNELS,
    DECODER_MODEL_WEIGHTS,
    RESIDUAL,
    Fused,
    attention_weights,
    linear,
    norms,
)

GLM = registry.register("glm")(
    Family(
        model_type="glm",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="attention_bias"),
            *linear("mlp.gate_up_proj", Fused((CHANNELS, CHANNELS)), RESIDUAL),
            *linear("mlp.down_proj", RESIDUAL, CHANNELS),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_factors=("mlp.gate_up_proj",),
    )
)
