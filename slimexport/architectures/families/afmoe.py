"""AFMoE (Trinity): outputs are normed, attention's also gated; experts behind a few blocks without."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    DECODER_MODEL_WEIGHTS,
    DENSE,
    DENSE_CHANNELS,
    EXPERTS,
    QUERY,
    RESIDUAL,
    SHARED,
    Weight,
    attention_weights,
    expert_ffn,
    gated_ffn,
    linear,
    norms,
    where,
)

registry.register("afmoe")(
    Family(
        model_type="afmoe",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias", head_norms=("q_norm", "k_norm")),
            *linear("self_attn.gate_proj", QUERY, RESIDUAL),
            *where(
                f"!{DENSE}",
                (
                    *expert_ffn("mlp.experts", "mlp.router.gate"),
                    Weight("mlp.expert_bias", (EXPERTS,)),
                    *gated_ffn("mlp.shared_experts", along=SHARED),
                ),
            ),
            *where(DENSE, gated_ffn(along=DENSE_CHANNELS)),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
        channels_field="moe_intermediate_size",
        channels_of_experts_alone=False,
        block_flags=lambda config, block: [DENSE] if block < config.num_dense_layers else [],
        fixed_axes=lambda config: {
            DENSE_CHANNELS: config.intermediate_size,
            SHARED: config.to_dict()["moe_intermediate_size"] * config.num_shared_experts,
        },
        outputs_normed=True,
        without_channels="their FFN has no experts",
    )
)
