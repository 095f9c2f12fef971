"""Rounding that repairs itself: what a column loses is put into the columns after it (GPTQ, arXiv 2210.17323).

For a product with weights W [N, K] whose inputs are the rows of X, H = X^T X. With U the upper Cholesky factor of the
inverse of H, columns are rounded in order; the error of column c, (w_c - level) / U[c, c], times U[c, c:] is taken from
the columns that are still to come (the paper's section 3.3). Blocks get their scales when their turn comes, of weights
that are repaired already.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slimexport.targets.quantise.levels import BLOCK, Floats, Levels, nearest, packed

DAMPING = 0.01  # of H's mean diagonal, added to it (the paper's)
SHRINKS = tuple(1 - 0.05 * step for step in range(8))  # of a block's range: large weights may be cut off


def repaired(source: Floats, H: NDArray[np.float64], bits: int) -> tuple[Levels, Floats]:
    """Levels of `source` [N, K], and the repaired weights [N, K] that they are the nearest ones of.

    `H` is [K, K]. Where rounding each weight to its nearest does no worse by H, it is that, and `source` itself.
    """
    plain = nearest(source, bits)
    made, target = _by_columns(np.asarray(source, np.float64), H, bits, source.dtype)
    if output_error(source, made, H) < output_error(source, plain, H):
        return made, target.astype(np.float32)
    return plain, source


def output_error(source: Floats, levels: Levels, H: NDArray[np.float64]) -> float:
    """Sum of squares of what the product's outputs change by, on the inputs that H is of."""
    difference = levels.numbers()[:, : source.shape[1]] - source
    return float(np.einsum("nk,nk->", difference @ H, difference))


def _by_columns(
    W: NDArray[np.float64], H: NDArray[np.float64], bits: int, dtype: np.dtype[np.floating]
) -> tuple[Levels, NDArray[np.float64]]:
    U = _inverse_factor(H)
    W, K = W.copy(), W.shape[1]
    codes, scales, zeros = np.zeros(W.shape, np.uint8), [], []
    for start in range(0, K, BLOCK):
        stop = min(start + BLOCK, K)
        scale, zero = _range(W[:, start:stop], bits, dtype)
        block, factor = W[:, start:stop].T.copy(), U[start:stop, start:stop]  # columns as rows: contiguous
        errors = np.empty_like(block)
        for column, weights in enumerate(block):
            code = np.clip(np.round(weights / scale + zero), 0, 2**bits - 1)
            codes[:, start + column] = code
            errors[column] = (weights - (code - zero) * scale) / factor[column, column]
            block[column + 1 :] -= np.outer(factor[column, column + 1 :], errors[column])
        W[:, start:stop] = block.T
        W[:, stop:] -= errors.T @ U[start:stop, stop:]
        scales.append(scale)
        zeros.append(zero)
    codes = np.pad(codes, ((0, 0), (0, -K % BLOCK)), constant_values=0)
    shape = (len(W), len(scales), BLOCK * bits // 8)
    zero_points = packed(np.stack(zeros, axis=1).astype(np.uint8), bits)
    return Levels(packed(codes, bits).reshape(shape), np.stack(scales, axis=1).astype(dtype), zero_points), W


def _inverse_factor(H: NDArray[np.float64]) -> NDArray[np.float64]:
    """Upper triangular U with U^T U the inverse of H, which is damped until it has one."""
    import torch

    damped = torch.from_numpy(H.copy())
    damped.diagonal()[damped.diagonal() == 0] = 1.0  # inputs that are never seen
    step = DAMPING * float(damped.diagonal().mean())
    while True:
        damped.diagonal().add_(step)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper: NDArray[np.float64] = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).numpy()
            return upper
        step *= 10


def _range(
    block: NDArray[np.float64], bits: int, dtype: np.dtype[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale and zero point [N] of a block [N, BLOCK]: of its range, or of that part of it which loses least."""
    low, high = np.minimum(block.min(axis=1), 0), np.maximum(block.max(axis=1), 0)
    best = np.full(len(block), np.inf)
    found = np.ones(len(block)), np.zeros(len(block))
    for shrink in SHRINKS:
        scale = (shrink * (high - low) / (2**bits - 1)).astype(dtype).astype(np.float64)
        scale[scale == 0] = 1.0
        zero = np.clip(np.round(-shrink * low / scale), 0, 2**bits - 1)
        code = np.clip(np.round(block / scale[:, None] + zero[:, None]), 0, 2**bits - 1)
        loss = (((code - zero[:, None]) * scale[:, None] - block) ** 2).sum(axis=1)
        better = loss < best
        best = np.where(better, loss, best)
        found = np.where(better, scale, found[0]), np.where(better, zero, found[1])
    return found
