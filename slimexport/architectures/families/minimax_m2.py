"""MiniMax M2: q and k are normed over all heads together, so that heads stay."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    DECODER_MODEL_WEIGHTS,
    EXPERTS,
    KEY_VALUE,
    QUERY,
    Weight,
    attention_weights,
    expert_ffn,
    norms,
)

registry.register("minimax_m2")(
    Family(
        model_type="minimax_m2",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(),
            Weight("self_attn.q_norm.weight", (QUERY,)),
            Weight("self_attn.k_norm.weight", (KEY_VALUE,)),
            *expert_ffn("mlp.experts", "mlp.gate"),
            Weight("mlp.e_score_correction_bias", (EXPERTS,)),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
        experts_field="num_local_experts",
        heads_prunable=False,
    )
)
