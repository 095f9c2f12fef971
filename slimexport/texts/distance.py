"""How far an evaluation text is from the calibration text, by their token ids alone.

A model loses more on text that is unlike what it was calibrated on; the figures then say as much about the choice of
text as about the pruning. Compared are the frequencies of the 200 most frequent tokens of the two, the rest counted as
one: those tell the kind of a text (its function words, its layout), rarer ones mostly its subject.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

FREQUENT = 200  # tokens that count each for itself
CHUNK = 64  # tokens; texts are sampled in pieces, as the words of a passage come together
DRAWS = 8
FEWEST = 1024  # tokens of each; of fewer the noise is as large as the threshold

# Bits. The distances with SmolLM2's tokenizer, 64 windows of 512 tokens of a text against the first 16,384 of another
# (the texts are those of `sources.SPLIT`, each with its own held-out part, and of shared/data):
#
#     calibrated on          articles  WikiText-2  news   code   ARC-Easy  raw WikiText-2 (` , ` and ` @-@ `)
#     wikipedia              0.020     0.051       0.055  0.269  0.184     0.160
#     WikiText-2 validation  0.042     0.039       0.061  0.255  0.205     0.142
#     news                   0.074     0.097       0.007  0.314  0.224     0.175
#     code                   0.236     0.263       0.249  0.118  0.326     0.338
#     default without chat   0.048     0.075       0.063  0.170  0.163     0.181
#
# Another seed changes these by 0.007 at most, 8 windows instead of 64 by 0.04. Edited prose to edited prose and code to
# code of other modules are at most 0.118 apart; other kinds begin at 0.142. Even that is known to cost much: at 30 %
# the perplexity was 1.70 x dense on WikiText-2 and 2.09 x on its raw form (shared/data/README.md).
FAR = 0.13


def divergence(a: torch.Tensor, b: torch.Tensor) -> float:
    """Jensen-Shannon divergence of the token frequencies of two texts (int64, any shape), in bits: 0 to 1, symmetric.

    As it stands it grows with shortness: two halves of one text are not alike either. `distance` takes that off.
    """
    import numpy as np

    return _divergence(*(np.bincount(ids, minlength=FREQUENT + 1) for ids in _pooled(a, b)))


def distance(calibration: torch.Tensor, evaluation: torch.Tensor) -> float:
    """Bits by which the evaluation text is farther from the calibration text than one half of that is from the other.

    Pieces of 64 tokens are drawn eight times (the same in every run), as many from each as half of the calibration text
    or all of the evaluation text has; the mean is given, never below 0. Both must have 128 tokens at least.
    """
    import numpy as np

    own, other = (ids[: len(ids) // CHUNK * CHUNK].reshape(-1, CHUNK) for ids in _pooled(calibration, evaluation))
    size = min(len(own) // 2, len(other))
    if not size:
        raise ValueError(f"distance() needs two pieces of {CHUNK} tokens of the calibration text and one of the other")
    random = np.random.default_rng(0)

    def draw() -> float:
        order = random.permutation(len(own))
        first, second = own[order[:size]], own[order[size : 2 * size]]
        away, expected = (_divergence(_counts(first), _counts(c)) for c in (random.permutation(other)[:size], second))
        return away - expected

    return max(0.0, float(np.mean([draw() for _ in range(DRAWS)])))


def warn_if_far(calibration: torch.Tensor, evaluation: torch.Tensor) -> str | None:
    """One line for people where the two are of different kinds; None where they are not, or are too short to say."""
    if min(calibration.numel() // 2, evaluation.numel()) < FEWEST:
        return None
    bits = distance(calibration, evaluation)
    if bits <= FAR:
        return None
    return (
        f"The evaluation text is of another kind than the calibration text (token frequencies {bits:.2f} bits apart, "
        f"{FAR:g} is far): a model loses more on such text; calibrate on text like what the model will see."
    )


def _pooled(a: torch.Tensor, b: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both texts with their most frequent tokens numbered from 0 and all others as `FREQUENT`."""
    import numpy as np

    one, two = (ids.flatten().numpy() for ids in (a, b))
    size = int(max(one.max(), two.max())) + 1
    shares = sum(np.bincount(ids, minlength=size) / len(ids) for ids in (one, two))
    number = np.full(size, FREQUENT)
    frequent = np.argsort(-shares, kind="stable")[:FREQUENT]
    number[frequent] = np.arange(len(frequent))
    return number[one], number[two]


def _counts(ids: Any) -> np.ndarray:
    import numpy as np

    return np.bincount(ids.ravel(), minlength=FREQUENT + 1)


def _divergence(a: np.ndarray, b: np.ndarray) -> float:
    p, q = a / a.sum(), b / b.sum()
    return max(0.0, _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2)


def _entropy(p: np.ndarray) -> float:
    import numpy as np

    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())
