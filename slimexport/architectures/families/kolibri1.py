"""Kolibri 1: outputs are normed, q and k per head; the expert that sees every token is left dense."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    DECODER_MODEL_WEIGHTS,
    EXPERTS,
    SHARED,
    Weight,
    attention_weights,
    expert_ffn,
    gated_ffn,
    norms,
)

registry.register("kolibri1")(
    Family(
        model_type="kolibri1",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"),
            *attention_weights(head_norms=("q_norm", "k_norm")),
            *expert_ffn("mlp.experts", "mlp.gate"),
            Weight("mlp.gate.e_score_correction_bias", (EXPERTS,)),
            *gated_ffn("mlp.shared_experts", along=SHARED),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
        channels_field="moe_intermediate_size",
        shared_channels_field="shared_expert_intermediate_size",
        outputs_normed=True,
    )
)
