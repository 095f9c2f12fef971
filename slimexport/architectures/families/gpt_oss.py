"""GPT-OSS: experts whose gate and up lie in turns, transposed and with biases; every head has a sink in its softmax."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    CHANNELS,
    DECODER_MODEL_WEIGHTS,
    EXPERTS,
    QUERY_HEADS,
    RESIDUAL,
    Fused,
    Weight,
    attention_weights,
    linear,
    norms,
)

GATE_UP = Fused((CHANNELS, CHANNELS), turns=CHANNELS)

registry.register("gpt_oss")(
    Family(
        model_type="gpt_oss",
        eager=True,
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            Weight("self_attn.sinks", (QUERY_HEADS,)),
            *linear("mlp.router", EXPERTS, RESIDUAL, "always"),
            Weight("mlp.experts.gate_up_proj", (EXPERTS, RESIDUAL, GATE_UP)),
            Weight("mlp.experts.gate_up_proj_bias", (EXPERTS, GATE_UP)),
            Weight("mlp.experts.down_proj", (EXPERTS, CHANNELS, RESIDUAL)),
            Weight("mlp.experts.down_proj_bias", (EXPERTS, RESIDUAL)),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
        experts_field="num_local_experts",
    )
)
