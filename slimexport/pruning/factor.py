"""What makes the inputs of down_proj, fitted once that is pruned: the up and the gate projection.

FFN(x) = D (s(G x) * U x) is linear in U, and in G it nearly is for a small change: a change V of either one moves the
output by D (t * V x), where t is how the product answers to that projection: s(G x) for U, s'(G x) * U x for G. Both
are fitted together by least squares toward what the re-fit of D left (Gauss-Newton for G, exact for U).

The equations couple all rows of both, and there are 2 x channels x hidden unknowns: conjugate gradients, with the
Kronecker product of D^T D * mean(t t^T) and mean(x x^T) as preconditioner (the two factors that K-FAC, arXiv
1503.05671, would use). There are not many more equations than unknowns: of less text, noise would be fitted; a few
steps hold the solution near the old weights, as a larger ridge would (docs/pruning.md has figures).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from slimexport.pruning.forward import instead
from slimexport.pruning.inverse import damped_inverse
from slimexport.ranks import ALONE, Ranks, summed

STEPS = 3
RIDGE = 0.1  # as a share of the mean diagonal of the system
PRECONDITIONER = 0.1  # damping of its two factors
TOKENS = 65_536  # of the calibration set, at most
EVERY = 4  # one piece of so many gives the preconditioner
CHECKED_TOKENS = 8_192
SHARES = (1.0, 0.5, 0.25)  # of the change that are tried, until one lowers the error

Matrices = list[torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """Some tokens: inputs of the projections, what their outputs are multiplied by, and what the block's output lacks.
    Any float dtype, one device."""

    x: torch.Tensor  # [tokens, in]
    slopes: tuple[torch.Tensor, ...]  # [tokens, channels] for each projection
    missed: torch.Tensor  # [tokens, out]


def fit_factors(
    D: torch.Tensor,
    pieces: Sequence[Piece],
    inputs: Sequence[int],
    ridge: float = RIDGE,
    steps: int = STEPS,
    every: int = EVERY,
    *,
    numbers: Sequence[int] | None = None,
    ranks: Ranks = ALONE,
) -> Matrices:
    """V_k near argmin mean ||sum_k D (t_k * V_k x) - missed||^2 + sum_k l_k ||V_k||^2, by `steps` conjugate gradients
    from zero: [channels, in] float64 for every projection.

    Each step lowers that sum, and with as many as unknowns V is the ridge solution.

    Args:
        D: [out, channels].
        inputs: of every projection.
        ridge: l_k as a share of the mean diagonal of the system, taken as if t_k and x were independent.
        every: one piece of so many gives the preconditioner and the size of the ridge.
        numbers: of `pieces`, among those of all `ranks`; None: they are all.
    """
    width, channels, parts = inputs[0], D.shape[1], range(len(inputs))
    whole = _Pieces(pieces, D, ranks)
    some = _Pieces([p for p, n in zip(pieces, numbers or range(len(pieces)), strict=True) if n % every == 0], D, ranks)
    gram = (D.T @ D).double()
    (of_x,) = some.mean([(width, width)], lambda p, _: [p.x.T @ p.x])
    squares = [(channels, channels) for _ in parts]
    of_slopes = [m * gram for m in some.mean(squares, lambda p, _: [t.T @ t for t in p.slopes])]
    held = [ridge * float(of_x.diagonal().mean()) * float(m.diagonal().mean()) for m in of_slopes]

    def moved(piece: Piece, V: Matrices) -> torch.Tensor:
        inner = [t * (piece.x @ v.to(piece.x).T) for t, v in zip(piece.slopes, V, strict=True)]
        return sum(inner[1:], inner[0]) @ D.T

    def transposed(outputs: Sequence[torch.Tensor]) -> Matrices:
        def products(piece: Piece, index: int) -> Iterable[torch.Tensor]:
            back = outputs[index] @ D
            return ((back * t).T @ piece.x for t in piece.slopes)

        return whole.mean([(channels, width) for _ in parts], products)

    left = transposed([piece.missed for piece in pieces])  # the residual of the normal equations
    V = [torch.zeros_like(part) for part in left]
    if not any(held) or not any(bool(part.any()) for part in left):
        return V
    inverse_x, *inverse_slopes = (damped_inverse(moment, PRECONDITIONER).inverse for moment in (of_x, *of_slopes))
    direction, last = V, math.inf
    for step in range(steps):
        better = [(inverse_slopes[k].to(inverse_x) @ left[k].to(inverse_x) @ inverse_x).to(left[k]) for k in parts]
        slope = _dot(left, better)
        if slope <= 0:
            break
        direction = [better[k] + slope / last * direction[k] for k in parts]
        outputs = [moved(piece, direction) for piece in pieces]
        bent = summed(ranks, sum(float(out.square().sum(dtype=torch.float64)) for out in outputs)) / whole.tokens
        length = slope / (bent + sum(held[k] * float(direction[k].square().sum()) for k in parts))
        V = [V[k] + length * direction[k] for k in parts]
        if step + 1 < steps:  # after the last nobody looks at what is left
            back = transposed(outputs)
            left = [left[k] - length * (back[k] + held[k] * direction[k]) for k in parts]
        last = slope
    return V


def _dot(a: Matrices, b: Matrices) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


class _Pieces:
    """Those of all ranks, of which this one has some."""

    def __init__(self, own: Sequence[Piece], like: torch.Tensor, ranks: Ranks):
        self._own, self._device, self._ranks = own, like.device, ranks
        self.tokens = round(summed(ranks, sum(len(piece.x) for piece in own)))

    def mean(
        self, shapes: Sequence[tuple[int, int]], products: Callable[[Piece, int], Iterable[torch.Tensor]]
    ) -> Matrices:
        """Of `products`, which are sums over a piece's tokens; in float64, a piece at a time: the widest are
        gigabytes."""
        total = [torch.zeros(shape, dtype=torch.float64, device=self._device) for shape in shapes]
        for index, piece in enumerate(self._own):
            for kept, product in zip(total, products(piece, index), strict=True):
                kept += product
        self._ranks.add_up(total)
        return [kept.div_(self.tokens) for kept in total]


def linearised(
    run: Callable[[], torch.Tensor], projections: Sequence[nn.Module]
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """(x, product, slopes): what `projections` are given while `run` calls them, what it returns, and the derivative of
    that, element by element, by the output of each.

    `run` gives the inputs of down_proj, made of the outputs of the projections element by element. A projection may
    hold several, one after the other, as Phi-3's gate and up: each has slopes of its own.
    """
    given: list[torch.Tensor] = []
    leaves: dict[nn.Module, torch.Tensor] = {}

    def leaf(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        original = module.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            given.append(x)
            with torch.no_grad():
                leaves[module] = original(x).detach()
            return leaves[module].requires_grad_()

        return forward

    with torch.enable_grad(), instead({module: leaf(module) for module in projections}):
        product = run()
        slopes = torch.autograd.grad(product.sum(), [leaves[module] for module in projections])
    # A projection that holds several (gate and up in one) makes as many inputs, side by side.
    width = product.shape[-1]
    return given[0], product.detach(), tuple(part for slope in slopes for part in slope.split(width, -1))
