"""OPT: learned positions, biases everywhere, an FFN without gate."""

from typing import Any

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    POSITIONS,
    RESIDUAL,
    Weight,
    attention_weights,
    model_weights,
    norm,
    norms,
    plain_ffn,
)


def _refusal(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "its norms come after the residual (OPT-350M)"
    if config.word_embed_proj_dim != config.hidden_size:
        return "its embedding has another width than its blocks"
    return None if config.layer_norm_elementwise_affine else "its norms have no weights"


registry.register("opt")(
    Family(
        model_type="opt",
        block_weights=(
            *norms("self_attn_layer_norm", "final_layer_norm", bias="always"),
            *attention_weights(qkv_bias="enable_bias", o_bias="enable_bias", output="out_proj"),
            *plain_ffn("fc1", "fc2", bias="enable_bias"),
        ),
        model_weights=model_weights(
            "model.decoder.embed_tokens",
            Weight("model.decoder.embed_positions.weight", (POSITIONS, RESIDUAL)),
            *norm("model.decoder.final_layer_norm", bias="always"),
        ),
        attention_output="self_attn.out_proj",
        ffn_output="fc2",
        ffn_factors=("fc1",),
        final_norm="model.decoder.final_layer_norm",
        decoder="model.decoder",
        blocks="model.decoder.layers",
        attributes={"self_attn.num_heads": "query_heads"},
        kv_groups_field=None,
        channels_field="ffn_dim",
        head_dim_field=None,
        positions=lambda config: config.max_position_embeddings + 2,
        refusal=_refusal,
    )
)
