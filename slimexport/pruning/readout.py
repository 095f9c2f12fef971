"""How sure the shrunk model is: one factor on its logits, kept in the weight of the final norm.

Errors of all blocks add up to noise in the last hidden state, and a model that does not know of it speaks with the
dense model's confidence about worse guesses. The factor is the inverse of a temperature (as in the calibration of
classifiers, arXiv 1706.04599), chosen so that the output comes nearest to the dense model's on sequences that nothing
else was fitted to. It changes no order among tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from slimexport.pruning.grid import centred

ONE_IN = 32  # sequences of the calibration set that are held out
MOST_TOKENS = 4_096
FEWEST = 8  # sequences below which none can be spared
NEWTON_STEPS = 12
LIMITS = (0.5, 1.5)


def held_out(sequences: int, length: int) -> list[int]:
    """Which of `sequences` of `length` tokens nothing is to be fitted to, evenly spread."""
    if sequences < FEWEST:
        return []
    count = max(1, min(sequences // ONE_IN, MOST_TOKENS // length))
    return centred(sequences, count)


def fit_scale(dense: Sequence[torch.Tensor], shrunk: Sequence[torch.Tensor]) -> float:
    """The s in LIMITS with the least mean KL(softmax(dense) || softmax(s * shrunk)).

    The divergence is convex in s: its first derivative is the mean of z under the second distribution less that under
    the first, its second the variance under the second.

    Args:
        dense, shrunk: logits [..., vocabulary], piece by piece.
    """
    scale = 1.0
    for _ in range(NEWTON_STEPS):
        slope = curvature = 0.0
        for wanted, z in zip(dense, shrunk, strict=True):
            p, q = wanted.softmax(-1), (scale * z).softmax(-1)
            mean = (q * z).sum(-1)
            slope += float((mean - (p * z).sum(-1)).sum(dtype=torch.float64))
            curvature += float(((q * z.square()).sum(-1) - mean.square()).sum(dtype=torch.float64))
        if curvature <= 0:
            return scale
        step = slope / curvature
        scale = min(max(scale - step, LIMITS[0]), LIMITS[1])
        if abs(step) < 1e-6:
            break
    return scale


def scale_logits(norm: nn.Module, scale: float, offset: float = 0.0) -> None:
    """Multiplies what comes out of the final norm, and with it the logits; `offset` is what the norm adds to its
    weight."""
    for name, parameter in norm.named_parameters():
        more = offset if name == "weight" else 0.0
        parameter.data = ((parameter.data.float() + more) * scale - more).to(parameter.dtype)
