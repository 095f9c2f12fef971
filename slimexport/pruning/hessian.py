"""Streaming H = X X^T / tokens."""

from __future__ import annotations

import torch


class Hessian:
    """Mean outer product of the inputs of one output matrix.

    Each batch's product is taken in float32 (TF32 off) and added up in float64, so that millions of tokens lose
    nothing to the sum; on a CPU the extra cost is one pass over [n, n] per batch.
    """

    def __init__(self, size: int, device: torch.device):
        self._sum = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """inputs [..., n] in any float dtype."""
        X = inputs.reshape(-1, inputs.shape[-1]).float()
        self._sum += X.T @ X
        self.tokens += len(X)

    def mean(self) -> torch.Tensor:
        """[n, n] float64, symmetric to the last bit."""
        H = self._sum / max(self.tokens, 1)
        return (H + H.T) / 2
