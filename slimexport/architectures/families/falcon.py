"""Falcon 7B (one KV group), 40B and 180B (several), RW (one for each head)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from slimexport.architectures import registry
from slimexport.architectures.base import Architecture
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    KEY_VALUE,
    KV_GROUPS,
    QUERY,
    RESIDUAL,
    Fused,
    Weight,
    linear,
    model_weights,
    norm,
    plain_ffn,
)
from slimexport.artifacts import BlockSizes

SERIAL, ONE_NORM, TWO_NORMS = "one after the other", "side by side, one norm", "side by side, two norms"
SPREAD = "keys and values are repeated for every query head before they are cached"


def _flags(config: Any) -> Iterator[str]:
    if config.new_decoder_architecture:
        yield SPREAD
    if not config.parallel_attn:
        yield SERIAL
        return
    # 40B leaves the number of norms to the code.
    two = config.num_ln_in_parallel_attn == 2 or (
        config.num_ln_in_parallel_attn is None and config.new_decoder_architecture
    )
    yield TWO_NORMS if two else ONE_NORM


def _cached(own: Architecture, sizes: BlockSizes) -> int:
    return 2 * own.head_dim * (sizes.query_heads if SPREAD in own.flags else sizes.kv_groups)


def _kv_groups(config: Any) -> int:
    several = config.new_decoder_architecture or not config.multi_query
    return config.num_kv_heads if several else 1


def _when(flag: str, *names: str) -> tuple[Weight, ...]:
    return tuple(replace(weight, when=flag) for name in names for weight in norm(name, bias="always"))


registry.register("falcon")(
    Family(
        model_type="falcon",
        block_weights=(
            *_when(SERIAL, "input_layernorm", "post_attention_layernorm"),
            *_when(ONE_NORM, "input_layernorm"),
            *_when(TWO_NORMS, "ln_attn", "ln_mlp"),
            *linear(
                "self_attention.query_key_value",
                Fused((QUERY, KEY_VALUE, KEY_VALUE), turns=KV_GROUPS),
                RESIDUAL,
                "bias",
            ),
            *linear("self_attention.dense", RESIDUAL, QUERY, "bias"),
            *plain_ffn("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", bias="bias"),
        ),
        model_weights=model_weights("transformer.word_embeddings", *norm("transformer.ln_f", bias="always")),
        attention="self_attention",
        attention_output="self_attention.dense",
        ffn_output="mlp.dense_4h_to_h",
        ffn_factors=("mlp.dense_h_to_4h",),
        final_norm="transformer.ln_f",
        decoder="transformer",
        blocks="transformer.h",
        returns_tuple=True,
        attributes={"self_attention.num_heads": "query_heads", "self_attention.num_kv_heads": "kv_groups"},
        kv_groups_field="num_kv_heads",
        kv_groups=_kv_groups,
        channels_field="ffn_hidden_size",
        head_dim_field=None,
        flags=_flags,
        cached=_cached,
        refusal=lambda config: "alibi gives every head a slope of its own" if config.alibi else None,
    )
)
