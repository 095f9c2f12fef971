"""LFM3: short convolutions in most blocks, outputs normed, attention's also gated by head."""

from slimexport.architectures import registry
from slimexport.architectures.families.lfm2 import SHORT_CONVOLUTION, convolution
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    QUERY_HEADS,
    RESIDUAL,
    attention_weights,
    gated_ffn,
    linear,
    model_weights,
    norm,
    norms,
    where,
)

registry.register("lfm3")(
    Family(
        model_type="lfm3",
        block_weights=(
            *norms("operator_norm", "ffn_norm", "post_operator_norm", "post_ffn_norm"),
            *where(
                "full_attention",
                (
                    *attention_weights(
                        qkv_bias="attention_bias", o_bias="attention_bias", head_norms=("q_norm", "k_norm")
                    ),
                    *linear("self_attn.g_proj", QUERY_HEADS, RESIDUAL),
                ),
            ),
            *SHORT_CONVOLUTION,
            *gated_ffn("feed_forward", names=("w1", "w3", "w2")),
        ),
        model_weights=model_weights("model.embed_tokens", *norm("model.embedding_norm")),
        ffn_output="feed_forward.w2",
        ffn_factors=("feed_forward.w3", "feed_forward.w1"),
        final_norm="model.embedding_norm",
        block_flags=lambda config, block: (config.layer_types[block],),
        fixed_axes=convolution,
        outputs_normed=True,
        without_heads="they have a short convolution instead",
    )
)
