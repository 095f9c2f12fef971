"""Mixtral: every block a mixture of experts."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, attention_weights, expert_ffn, norms

registry.register("mixtral")(
    Family(
        model_type="mixtral",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(),
            *expert_ffn("mlp.experts", "mlp.gate"),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
        experts_field="num_local_experts",
    )
)
