"""Beam: outputs are normed, attention's also gated; experts behind a few blocks without."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    DECODER_MODEL_WEIGHTS,
    DENSE,
    DENSE_CHANNELS,
    EXPERTS,
    QUERY,
    QUERY_HEADS,
    RESIDUAL,
    Weight,
    attention_weights,
    linear,
    mixed_ffn,
    norms,
)

registry.register("beam")(
    Family(
        model_type="beam",
        block_weights=(
            *norms(
                "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
            ),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias", head_norms=("q_norm", "k_norm")),
            *linear("self_attn.gate_proj", QUERY, RESIDUAL),
            Weight("self_attn.gate_bias", (QUERY_HEADS,)),
            *mixed_ffn(Weight("mlp.gate.e_score_correction_bias", (EXPERTS,))),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
        channels_field="moe_intermediate_size",
        block_flags=lambda config, block: [DENSE] if config.mlp_layer_types[block] != "sparse" else [],
        fixed_axes=lambda config: {DENSE_CHANNELS: config.intermediate_size},
        softcap_field="final_logit_softcapping",
        outputs_normed=True,
        without_channels="their FFN has no experts",
    )
)
