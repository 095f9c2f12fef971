"""The same model off the 4-bit grid, so that what quantising costs is measured fairly.

The blocks of the demo model were dequantised from 4 bits, so int4 in blocks of 32 gives them back exactly (relative
error 0.000), while a pruned and re-fitted model is off that grid: quantising looks free for the dense model only.
`off_grid` makes an equivalent dense model whose weights lie on no grid (0.078, as for Gaussian numbers). The embedding
was stored in 8 bits, so the tied lm_head never was on the 4-bit grid (0.090, and 0.078 once rotated).
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from slimexport.errors import BadInputError

READ_ATTENTION, READ_FFN = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@torch.no_grad()
def off_grid(model: Any, seed: int = 0) -> Any:
    """A copy of `model` that computes the same logits from other weights; its lm_head is untied.

    The residual stream h [t, hidden size] is turned to h Q by a random orthogonal Q (the computational invariance of
    SliceGPT, arXiv 2401.15024): RMSNorm does not see a rotation once its weight g is folded into what reads it, so

        embedding E -> E Q;  q, k, v, gate, up, lm_head W -> W diag(g) Q;  o, down W -> Q^T W (bias b -> b Q);  g -> 1

    The final norm goes into the lm_head and not into the embedding: a tied model comes back untied, that much larger,
    and `config.tie_word_embeddings` says so. Computed in float64, returned in the model's precision; blocks of
    different sizes are fine. A rotation also spreads outliers over all dimensions (that is what QuaRot uses it for), so
    the rotated model is rather kinder to few bits than a trained float model would be: what it loses is a better figure
    for the dense model than the grid's, and still a low one.

    Raises BadInputError for a family whose residual is read or written by other modules than these.
    """
    if model.config.model_type not in FAMILIES:
        raise BadInputError(f"off_grid knows {', '.join(FAMILIES)}, not {model.config.model_type}.")
    turned = copy.deepcopy(model)
    embedding, head, body = turned.get_input_embeddings(), turned.get_output_embeddings(), turned.model
    rotation = random_rotation(embedding.weight.shape[1], seed).to(embedding.weight.device)
    readout = head.weight.double()  # taken before the embedding turns: they may be one tensor
    for block in body.layers:
        _read(block.input_layernorm, [getattr(block.self_attn, name) for name in READ_ATTENTION], rotation)
        _write(block.self_attn.o_proj, rotation)
        _read(block.post_attention_layernorm, [getattr(block.mlp, name) for name in READ_FFN], rotation)
        _write(block.mlp.down_proj, rotation)
    head.weight = _parameter(readout * body.norm.weight.double() @ rotation, head.weight)
    body.norm.weight.fill_(1)
    embedding.weight = _parameter(embedding.weight.double() @ rotation, embedding.weight)
    turned.config.tie_word_embeddings = False
    turned.all_tied_weights_keys = {}  # else saving would leave the lm_head out
    return turned


def random_rotation(size: int, seed: int) -> torch.Tensor:
    """float64 [size, size], orthogonal, uniformly distributed; the same for the same seed."""
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    return q * r.diagonal().sign()  # without the signs, QR's own convention would show in Q


def _read(norm: Any, readers: list[Any], rotation: torch.Tensor) -> None:
    """W [out, hidden] -> W diag(g) Q."""
    for linear in readers:
        linear.weight = _parameter(linear.weight.double() * norm.weight.double() @ rotation, linear.weight)
    norm.weight.fill_(1)


def _write(linear: Any, rotation: torch.Tensor) -> None:
    """W [hidden, in] -> Q^T W, b [hidden] -> b Q."""
    linear.weight = _parameter(rotation.T @ linear.weight.double(), linear.weight)
    if linear.bias is not None:
        linear.bias = _parameter(linear.bias.double() @ rotation, linear.bias)


def _parameter(value: torch.Tensor, like: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(value.to(like.dtype), requires_grad=like.requires_grad)
