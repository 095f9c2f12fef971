"""A model's weights under llama.cpp's names, in the order of rows that it wants."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from slimexport.errors import BadInputError
from slimexport.targets.gguf.architecture import Kind, rope_factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimexport.architectures.base import Architecture

Tensors = dict[str, NDArray[np.float32]]
"""Name in the file -> float32, [out, in] or one-dimensional."""

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_TURNED = ("attn_q", "attn_k")


def tensors_of(model: PreTrainedModel, architecture: Architecture, kind: Kind) -> Tensors:
    """All weights; a tied lm_head is the embedding. Raises BadInputError for one that has no place in the file."""
    found: Tensors = {}
    for name, weight in model.state_dict().items():
        if architecture.tied and name == "lm_head.weight":
            continue
        new = file_name(name)
        array: NDArray[np.float32] = weight.detach().float().cpu().numpy()
        if kind.neighbours and new.split(".")[-2] in _TURNED:
            array = neighbours(array, architecture.head_dim)
        found[new] = array
    factors = rope_factors(model, model.config)
    if factors is not None:
        found["rope_freqs.weight"] = factors
    return found


def file_name(name: str) -> str:
    """Of a weight or bias of a transformers model."""
    module, _, end = name.rpartition(".")
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    new = _BLOCK.get(block[2]) if block else _MODEL.get(module)
    if new is None:
        raise BadInputError(f"The weight {name} has no place in a GGUF file of this architecture.")
    return f"blk.{block[1]}.{new}.{end}" if block else f"{new}.{end}"


def neighbours(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Rows [heads x head_dim, ...] in another order: transformers turns row i of a head with row i + head_dim / 2,
    llama.cpp each even row with the next."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
