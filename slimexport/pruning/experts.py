"""The inputs of the FFN's output matrix, or of a mixture of experts: each expert's channels are chosen by the tokens
that the router sends to it.

All experts of a block keep the same number of channels (their matrices are one tensor), each its own. What an expert
adds is multiplied by the router's weight, and so are its inputs here: an error counts as much as the output sees of it.
The router is left alone. An FFN without experts is one expert that sees everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from slimexport.pruning.hessian import Moments
from slimexport.pruning.matrices import matrix


def ffn_inputs(module: nn.Module, given: tuple[torch.Tensor, ...]) -> Iterator[tuple[int, torch.Tensor]]:
    """(expert, inputs of its output matrix [..., channels]) of every expert that sees a token.

    Args:
        module: the FFN's output matrix; or transformers' module of experts, with `gate_up_proj` [experts, 2 x channels,
            hidden] or transposed, a bias of it or none, and `_apply_gate`, which makes `channels` of twice as many.
        given: what it is called with: its inputs; or hidden states [tokens, hidden], and the router's choice and
            weights, each [tokens, experts per token].
    """
    if len(given) == 1:
        yield 0, given[0]
        return
    experts: Any = module
    hidden_states, index, weights = given
    for expert in index.unique().tolist():
        token, place = torch.where(index == expert)
        W = experts.gate_up_proj[expert]
        bias = experts.gate_up_proj_bias[expert] if experts.has_bias else None
        gate_up = functional.linear(hidden_states[token], W.T if experts.is_transposed else W, bias)
        X = experts._apply_gate(gate_up)
        yield expert, X * weights[token, place, None].to(X)


def ffn_matrices(module: nn.Module) -> list[torch.Tensor]:
    """The output matrix of every expert, [out, channels]."""
    W = matrix(module)
    return list(W) if W.dim() == 3 else [W]


def add_ffn_inputs(
    moments: list[Moments], module: nn.Module, given: tuple[torch.Tensor, ...], targets: torch.Tensor | None = None
) -> None:
    """Adds what `module` is given to the moments of each expert."""
    for expert, X in ffn_inputs(module, given):
        moments[expert].add(X, targets)
