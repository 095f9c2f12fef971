"""The inverse of H, damped: by a Cholesky factor, in float32 where that is good enough. This module imports torch and
nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")

DAMPING_RETRIES = 6
SINGLE_FROM = 2048  # inputs: from here on a factor is tried in float32 first; smaller ones take no time in float64
SINGLE_RESIDUAL = 1e-3  # of A in float32, at most: what compensation loses to it is of second order
ROWS = 512  # of a matrix that are converted or multiplied at a time: the widest are gigabytes


class NotPositiveDefiniteError(RuntimeError):
    """H stayed singular even with the largest damping that was tried."""


class DampedInverse(NamedTuple):
    """(H + ridge I)^-1."""

    inverse: torch.Tensor  # [n, n] float64, or float32 where that was found good enough
    dead: torch.Tensor  # [n] bool, inputs that never fired: as if of size one, so that removing them touches nothing
    damping: float  # that was used, as a share of the mean diagonal
    ridge: float


def solved(H: torch.Tensor, damping: float, solve: Callable[[DampedInverse], T]) -> tuple[T, DampedInverse]:
    """`solve` by the damped inverse of H: again by one in float64, where by one in float32 a Cholesky factor fails."""
    found = damped_inverse(H, damping)
    try:
        return solve(found), found
    except torch.linalg.LinAlgError:
        if found.inverse.dtype == torch.float64:
            raise
    del found  # half as large as the next one
    found = damped_inverse(H, damping, single=False)
    return solve(found), found


def damped_inverse(H: torch.Tensor, damping: float, *, single: bool = True) -> DampedInverse:
    """Inverse of H + lambda I, lambda = damping * mean(diag H), ten times more whenever Cholesky fails.

    Of SINGLE_FROM inputs and more it is computed in float32 first, and kept where (H + lambda I) A v is v within
    SINGLE_RESIDUAL for random v, by H as it is but for the scale of its inputs; else in float64, as for fewer inputs.

    Args:
        H: [n, n], symmetric, float64.
        damping: share of the mean diagonal.
        single: whether float32 will do.
    """
    diagonal = H.diagonal().double()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    for _ in range(DAMPING_RETRIES):
        ridge = damping * mean
        raised = diagonal.masked_fill(dead, 1.0) + ridge
        if single and len(H) >= SINGLE_FROM and (found := _inverse_in_single(H, raised)) is not None:
            return DampedInverse(found, dead, damping, ridge)
        damped = H.double().clone(memory_format=torch.contiguous_format)
        damped.diagonal().copy_(raised)
        if _invert(damped):
            return DampedInverse(damped, dead, damping, ridge)
        del damped  # the next one is as large
        damping *= 10
    raise NotPositiveDefiniteError(f"H of size {len(H)} is not positive definite, even with damping {damping / 10:g}")


def _inverse_in_single(H: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor | None:
    """Inverse of H with this `diagonal` [n] by a float32 Cholesky, None where that is not accurate enough.

    Scaled to a unit diagonal, S H S: activations of one channel may be a thousand times those of another, and it is
    only what then is left of H's condition that costs digits.
    """
    n, scale = len(H), diagonal.rsqrt()
    inverse = torch.empty(n, n, dtype=torch.float32, device=H.device)  # first of S H S
    single = scale.float()
    for start in range(0, n, ROWS):
        rows = slice(start, start + ROWS)
        inverse[rows].copy_(H[rows]).mul_(single[rows, None]).mul_(single)
    inverse.diagonal().fill_(1.0)
    if not _invert(inverse, single):
        return None
    v = torch.randint(2, (n, 1), generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).to(H)
    x = (inverse @ (v / scale[:, None]).float()).double()
    back = scale[:, None] * (H @ x + (diagonal - H.diagonal())[:, None] * x)
    # NaN is not accurate enough either.
    return inverse if float((back - v).norm()) <= SINGLE_RESIDUAL * float(v.norm()) else None


def _invert(A: torch.Tensor, scale: torch.Tensor | None = None) -> bool:
    """S A^-1 S in place of A [n, n], contiguous and symmetric; S = diag(scale) [n], or one. False, with anything in A,
    where it is not positive definite.

    By A = L L^T, V = L^-T and V V^T; the latter two nearly all by products of blocks, faster than
    torch.cholesky_inverse, and in no more memory.
    """
    lower, failed = A.T, torch.empty(0, dtype=torch.int32, device=A.device)  # of which LAPACK wants columns in memory
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if bool(failed):
        return False
    V = A  # upper triangular
    blocks = [slice(start, start + ROWS) for start in range(0, len(V), ROWS)]
    for own in blocks:
        corner, above = V[own, own], V[: own.start, own]
        one = torch.eye(len(corner), dtype=V.dtype, device=V.device)
        corner.copy_(torch.linalg.solve_triangular(corner, one, upper=True, left=False))
        product = above @ -corner
        for rows in blocks[: own.start // ROWS]:  # what stands to the left is inverted already
            torch.mm(V[rows, rows.start : own.start], product[rows.start :], out=above[rows])
    if scale is not None:
        V *= scale[:, None]
    for own in blocks:  # into the zeros on the left, and what V has in them no other block needs
        right = V[own, own.start :]
        torch.mm(right, V[: own.start, own.start :].T, out=V[own, : own.start])
        V[own, own] = right @ right.T
    for own in blocks:
        V[: own.start, own] = V[own, : own.start].T
    return True
