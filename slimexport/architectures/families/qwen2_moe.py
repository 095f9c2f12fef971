"""Qwen 1.5 and 2 with experts; the one that sees every token is left dense."""

from collections.abc import Iterator
from typing import Any

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    DECODER_MODEL_WEIGHTS,
    DENSE,
    DENSE_CHANNELS,
    ONE,
    RESIDUAL,
    SHARED,
    Weight,
    attention_weights,
    gated_ffn,
    mixed_ffn,
    norms,
)


def dense_blocks(config: Any, block: int) -> Iterator[str]:
    """As transformers decides it for Qwen's mixtures."""
    if block in config.mlp_only_layers or (block + 1) % config.decoder_sparse_step:
        yield DENSE


FAMILY = registry.register("qwen2_moe")(
    Family(
        model_type="qwen2_moe",
        block_weights=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *attention_weights(qkv_bias="qkv_bias"),
            *mixed_ffn(
                *gated_ffn("mlp.shared_expert", along=SHARED), Weight("mlp.shared_expert_gate.weight", (ONE, RESIDUAL))
            ),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_output="mlp.experts",
        ffn_factors=(),
        experts=True,
        channels_field="moe_intermediate_size",
        shared_channels_field="shared_expert_intermediate_size",
        block_flags=dense_blocks,
        fixed_axes=lambda config: {DENSE_CHANNELS: config.intermediate_size},
        without_channels="their FFN has no experts",
    )
)
