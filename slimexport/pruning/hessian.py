"""Streaming moments of the inputs of one output matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slimexport.errors import BadInputError
from slimexport.pruning.inverse import NotPositiveDefiniteError
from slimexport.ranks import ALONE, Ranks, summed

ROWS = 768  # of H that are added to at a time


class Moments:
    """H = mean x x^T and mean x, and where targets are given, C = mean y x^T.

    Each batch's products are taken in float32 (TF32 off) and added up in float64, so that millions of tokens lose
    nothing to the sum; on a CPU the extra cost is one pass over half of [n, n] per batch. H is symmetric: what is left
    of its diagonal blocks is not computed, but copied in the end.
    """

    def __init__(self, size: int, device: torch.device, targets: int | None = None, ranks: Ranks = ALONE):
        """`size` inputs; `targets` outputs, None where there are none. Means are over the tokens of all `ranks`, which
        have to ask for them together."""
        self._ranks = ranks
        self._squares = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)
        self._cross = None if targets is None else torch.zeros(targets, size, dtype=torch.float64, device=device)
        self.tokens = 0
        self._finished = False  # the sums are means

    def add(self, inputs: torch.Tensor, targets: torch.Tensor | None = None) -> None:
        """inputs [..., n], targets [..., out], in any float dtype. Not after the first question for a mean."""
        assert not self._finished, "means were taken already"
        X = inputs.reshape(-1, inputs.shape[-1]).float()
        for start in range(0, X.shape[1], ROWS):
            self._squares[start : start + ROWS, start:] += X[:, start : start + ROWS].T @ X[:, start:]
        self._sum += X.sum(0, dtype=torch.float64)
        if self._cross is not None and targets is not None:
            self._cross += targets.reshape(-1, targets.shape[-1]).float().T @ X
        self.tokens += len(X)

    def H(self) -> torch.Tensor:
        """[n, n] float64, symmetric to the last bit; the sums' own memory, gigabytes for wide FFNs."""
        self._finish()
        return self._squares

    def mean(self) -> torch.Tensor:
        """[n] float64."""
        self._finish()
        return self._sum

    def C(self) -> torch.Tensor:
        """[out, n] float64; only where targets were given."""
        assert self._cross is not None, "no targets were asked for"
        self._finish()
        return self._cross

    def _finish(self) -> None:
        if self._finished:
            return
        self._finished = True
        sums = [total for total in (self._squares, self._sum, self._cross) if total is not None]
        self._ranks.add_up(sums)
        self.tokens = round(summed(self._ranks, self.tokens))
        for total in sums:
            total /= max(self.tokens, 1)
        for start in range(0, len(self._squares), ROWS):
            end = start + ROWS
            block = self._squares[start:end, start:end]
            block.copy_((block + block.T) / 2)
            self._squares[end:, start:end] = self._squares[start:end, end:].T


def check_finite(found: torch.Tensor, block: int, dtype: torch.dtype) -> None:
    """Raises BadInputError where activations of `block`, or the squares on the diagonal of H, which are no smaller than
    what is beside it, were too large for `dtype`, the forward passes' precision."""
    if not bool(torch.isfinite(found).all()):
        raise BadInputError(f"The activations of block {block} overflow in {overflow(dtype)}.")


def overflow(dtype: torch.dtype) -> str:
    """The precision, and what to do about it where another one has a wider range."""
    name = str(dtype).removeprefix("torch.")
    wider = {"float16": "use --dtype float32 (or bfloat16)", "bfloat16": "use --dtype float32"}
    return f"{name}: {wider.get(name, 'a weight or a scale of the model is too large')}"


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
