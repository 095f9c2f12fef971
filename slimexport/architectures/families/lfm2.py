"""LFM2: short convolutions in most blocks, which are left dense, and attention in the others."""

from typing import Any

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    ONE,
    RESIDUAL,
    Weight,
    attention_weights,
    gated_ffn,
    linear,
    model_weights,
    norm,
    norms,
    where,
)

KERNEL, CONVOLVED = "convolution_kernel", "convolution_inputs"


def channels(config: Any) -> int:
    """What the config means by its `intermediate_size`: two thirds of it, rounded up, unless it says otherwise."""
    size: int = config.intermediate_size
    if not config.block_auto_adjust_ff_dim:
        return size
    size = int(2 * size / 3)
    if config.block_ffn_dim_multiplier is None:
        return size
    steps = -(-int(config.block_ffn_dim_multiplier * size) // config.block_multiple_of)
    return int(config.block_multiple_of * steps)


def convolution(config: Any) -> dict[str, int]:
    return {KERNEL: config.conv_L_cache, CONVOLVED: 3 * config.hidden_size}


SHORT_CONVOLUTION = where(
    "conv",
    (
        Weight("conv.conv.weight", (RESIDUAL, ONE, KERNEL)),
        Weight("conv.conv.bias", (RESIDUAL,), when="conv_bias"),
        *linear("conv.in_proj", CONVOLVED, RESIDUAL, "conv_bias"),
        *linear("conv.out_proj", RESIDUAL, RESIDUAL, "conv_bias"),
    ),
)

FAMILY = registry.register("lfm2")(
    Family(
        model_type="lfm2",
        block_weights=(
            *norms("operator_norm", "ffn_norm"),
            *where("full_attention", attention_weights(output="out_proj", head_norms=("q_layernorm", "k_layernorm"))),
            *SHORT_CONVOLUTION,
            *gated_ffn("feed_forward", names=("w1", "w3", "w2")),
        ),
        model_weights=model_weights("model.embed_tokens", *norm("model.embedding_norm")),
        attention_output="self_attn.out_proj",
        ffn_output="feed_forward.w2",
        ffn_factors=("feed_forward.w3", "feed_forward.w1"),
        final_norm="model.embedding_norm",
        channels=channels,
        settled={"block_auto_adjust_ff_dim": False},
        block_flags=lambda config, block: (config.layer_types[block],),
        fixed_axes=convolution,
        without_heads="they have a short convolution instead",
    )
)
