"""The factor of a gated FFN, fitted by least squares: FFN(x) = D (s(x) * U x) is linear in the up projection U once the
gate s(x) is taken as it is, so that U can repair what the re-fit of D left.

The equations U has to meet couple all of its rows, and there are channels x hidden unknowns: conjugate gradients, with
the Kronecker product of D^T D * mean(s s^T) and mean(x x^T) as preconditioner (the two factors that K-FAC, arXiv
1503.05671, would use). A few steps are enough, and hold the solution near U as a ridge does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from slimexport.pruning.forward import instead
from slimexport.pruning.obs import damped_inverse

STEPS = 3
RIDGE = 0.1  # as a share of the mean diagonal of the system
TOKENS = 20_480  # of the calibration set: each gives `hidden` equations, so few are enough


@dataclass(frozen=True)
class Piece:
    """Some tokens: inputs of U, the gate, and what the block's output lacks. Any float dtype, one device."""

    x: torch.Tensor  # [tokens, in]
    gate: torch.Tensor  # [tokens, channels]
    missed: torch.Tensor  # [tokens, out]


def fit_factor(
    U: torch.Tensor, D: torch.Tensor, pieces: Sequence[Piece], ridge: float = RIDGE, steps: int = STEPS
) -> torch.Tensor:
    """U + V with V near argmin_V mean ||D (s * V x) - missed||^2 + l ||V||^2, `steps` conjugate gradients from V = 0.

    Every step lowers that sum. With as many steps as unknowns V is the ridge solution.

    Args:
        U: [channels, in]; D: [out, channels].
        ridge: l as a share of the mean diagonal of the system, taken as if gate and input were independent.
    """
    tokens = sum(len(piece.x) for piece in pieces)
    of_x = _summed(p.x.T @ p.x for p in pieces) / tokens
    of_gate = _summed(p.gate.T @ p.gate for p in pieces) / tokens * (D.T @ D).double()
    scale_x, scale_gate = float(of_x.diagonal().mean()), float(of_gate.diagonal().mean())
    held = ridge * scale_x * scale_gate

    def transposed(outputs: Iterator[torch.Tensor]) -> torch.Tensor:
        return _summed((out @ D * p.gate).T @ p.x for p, out in zip(pieces, outputs, strict=True)) / tokens

    def system(V: torch.Tensor) -> torch.Tensor:
        return transposed((p.gate * (p.x @ V.to(p.x).T)) @ D.T for p in pieces) + held * V

    left = transposed(p.missed for p in pieces)  # the residual of the normal equations
    V = torch.zeros_like(left)
    if not held or not bool(left.any()):
        return U + V.to(U)
    inverse_x, inverse_gate = (damped_inverse(moment, ridge)[0] for moment in (of_x, of_gate))
    direction, last = torch.zeros_like(V), math.inf
    for _ in range(steps):
        better = inverse_gate @ left @ inverse_x
        slope = float((left * better).sum())
        if slope <= 0:
            break
        direction = better + slope / last * direction
        bent = system(direction)
        length = slope / float((direction * bent).sum())
        V += length * direction
        left -= length * bent
        last = slope
    return U + V.to(U)


def _summed(products: Iterator[torch.Tensor]) -> torch.Tensor:
    """In float64, one at a time: the widest are gigabytes."""
    total = next(products).double()
    for product in products:
        total += product
    return total


@contextmanager
def constant(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within it, `module` (the up projection) gives ones: what it multiplies then comes out of the product alone.

    Yields a list that takes what `module` is given.
    """
    channels = module.get_parameter("weight").shape[0]
    given: list[torch.Tensor] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        given.append(x)
        return x.new_ones(*x.shape[:-1], channels)

    with instead({module: forward}):
        yield given
