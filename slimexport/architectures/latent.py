"""Attention whose keys and values come from one latent vector (MLA; DeepSeek-V2, arXiv 2405.04434, section 2.1).

The projections down to the latents see no heads and stay. A head owns its rows of what leads up from them (its query;
its key without positions and its value together) and its columns of the output matrix. What is cached is the latent
and the one key that turns with positions: fewer heads make it no smaller.
"""

from __future__ import annotations

from typing import Any

from slimexport.architectures.weights import (
    KEY_VALUE_RANK,
    LATENT_KEY_VALUE,
    LATENT_QUERY,
    QUERY,
    QUERY_RANK,
    RESIDUAL,
    Weight,
    linear,
    where,
)

COMPRESSED = "compressed_key_value"  # the latent, and the key with positions


def latent_attention_weights(prefix: str = "self_attn") -> tuple[Weight, ...]:
    """Queries come from a latent of their own, or from the residual where `q_lora_rank` is not set."""
    bias = "attention_bias"
    return (
        *where(
            "q_lora_rank",
            [
                *linear(f"{prefix}.q_a_proj", QUERY_RANK, RESIDUAL, bias),
                Weight(f"{prefix}.q_a_layernorm.weight", (QUERY_RANK,)),
                *linear(f"{prefix}.q_b_proj", LATENT_QUERY, QUERY_RANK),
            ],
        ),
        *where("!q_lora_rank", linear(f"{prefix}.q_proj", LATENT_QUERY, RESIDUAL)),
        *linear(f"{prefix}.kv_a_proj_with_mqa", COMPRESSED, RESIDUAL, bias),
        Weight(f"{prefix}.kv_a_layernorm.weight", (KEY_VALUE_RANK,)),
        *linear(f"{prefix}.kv_b_proj", LATENT_KEY_VALUE, KEY_VALUE_RANK),
        *linear(f"{prefix}.o_proj", RESIDUAL, QUERY, bias),
    )


def ranks(config: Any) -> dict[str, int]:
    """For `Family.fixed_axes`."""
    return {
        QUERY_RANK: config.q_lora_rank or 0,
        KEY_VALUE_RANK: config.kv_lora_rank,
        COMPRESSED: config.kv_lora_rank + config.qk_rope_head_dim,
    }


def _widths(config: Any) -> dict[str, int]:
    return {
        LATENT_QUERY: config.qk_nope_head_dim + config.qk_rope_head_dim,
        LATENT_KEY_VALUE: config.qk_nope_head_dim + config.v_head_dim,
    }


def _refusal(config: Any) -> str | None:
    sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    missing = next(
        (name for name in sizes if not getattr(config, name)), "q_lora_rank" if config.q_lora_rank == 0 else ""
    )
    if missing:
        return f"its config has {missing} {getattr(config, missing)!r}"
    if config.num_key_value_heads == config.num_attention_heads:
        return None
    return "its KV heads are not as many as its query heads, while each of these has a key of its own"


LATENT: dict[str, Any] = {
    "attributes": {"self_attn.num_heads": "query_heads"},
    "head_dim_field": "v_head_dim",
    "head_axes": _widths,
    "cached": lambda own, _: own.fixed_axes[COMPRESSED],
    "refusal": _refusal,
}
"""The fields of `Family` by which such attention differs; `fixed_axes` are `ranks` and what else the family has."""
