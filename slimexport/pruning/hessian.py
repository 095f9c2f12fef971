"""Streaming moments of the inputs of one output matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slimexport.errors import BadInputError
from slimexport.pruning.obs import NotPositiveDefiniteError


class Moments:
    """H = mean x x^T and mean x, and where targets are given, C = mean y x^T.

    Each batch's products are taken in float32 (TF32 off) and added up in float64, so that millions of tokens lose
    nothing to the sum; on a CPU the extra cost is one pass over [n, n] per batch.
    """

    def __init__(self, size: int, device: torch.device, targets: int | None = None):
        """`size` inputs; `targets` outputs, None where there are none."""
        self._squares = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)
        self._cross = None if targets is None else torch.zeros(targets, size, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, inputs: torch.Tensor, targets: torch.Tensor | None = None) -> None:
        """inputs [..., n], targets [..., out], in any float dtype."""
        X = inputs.reshape(-1, inputs.shape[-1]).float()
        self._squares += X.T @ X
        self._sum += X.sum(0, dtype=torch.float64)
        if self._cross is not None and targets is not None:
            self._cross += targets.reshape(-1, targets.shape[-1]).float().T @ X
        self.tokens += len(X)

    def H(self) -> torch.Tensor:
        """[n, n] float64, symmetric to the last bit."""
        H = self._squares / max(self.tokens, 1)
        return (H + H.T) / 2

    def mean(self) -> torch.Tensor:
        """[n] float64."""
        return self._sum / max(self.tokens, 1)

    def C(self) -> torch.Tensor:
        """[out, n] float64; only where targets were given."""
        assert self._cross is not None, "no targets were asked for"
        return self._cross / max(self.tokens, 1)


def check_finite(found: torch.Tensor, block: int, dtype: torch.dtype) -> None:
    """Raises BadInputError where activations of `block`, or their moments, were too large for `dtype`, the forward
    passes' precision."""
    if not bool(torch.isfinite(found).all()):
        raise BadInputError(
            f"The activations of block {block} overflow in {str(dtype).removeprefix('torch.')}; "
            "use --dtype float32 (or bfloat16)."
        )


@contextmanager
def solvable(block: int) -> Iterator[None]:
    """Within it, an H that cannot be inverted is bad input: the text's, or the damping's."""
    try:
        yield
    except (NotPositiveDefiniteError, torch.linalg.LinAlgError) as error:
        raise BadInputError(
            f"The inputs of block {block} are too few or too alike to prune by ({error}): "
            "give more --calibration-tokens or a larger --damping."
        ) from error
