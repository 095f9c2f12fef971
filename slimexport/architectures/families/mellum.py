"""Mellum 2: Qwen 3 with experts, and sliding windows in some blocks."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, attention_weights, expert_ffn, norms

registry.register("mellum")(
    Family(
        model_type="mellum",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias", head_norms=("q_norm", "k_norm")),
            *expert_ffn("mlp.experts", "mlp.gate"),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
        channels_field="moe_intermediate_size",
        refusal=lambda config: "some of its blocks have no experts" if "dense" in config.mlp_layer_types else None,
    )
)
