"""Qwen 3.5 with experts in every block, the text model; the expert that sees every token is left dense."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.qwen3_5_text import FAMILY as QWEN3_5
from slimexport.architectures.weights import CHANNELS, ONE, RESIDUAL, SHARED, Weight, expert_ffn, gated_ffn

registry.register("qwen3_5_moe_text")(
    replace(
        QWEN3_5,
        model_type="qwen3_5_moe_text",
        block_weights=(
            *(w for w in QWEN3_5.block_weights if not w.runs_along(CHANNELS)),
            *expert_ffn("mlp.experts", "mlp.gate"),
            *gated_ffn("mlp.shared_expert", along=SHARED),
            Weight("mlp.shared_expert_gate.weight", (ONE, RESIDUAL)),
        ),
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
        channels_field="moe_intermediate_size",
        shared_channels_field="shared_expert_intermediate_size",
    )
)
