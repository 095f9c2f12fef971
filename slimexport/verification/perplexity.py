"""Token perplexity, KL divergence to the dense model, and top-1 agreement, on the exported graphs themselves.

Token perplexity = exp(mean NLL per token). The text is cut into windows of `window` tokens without overlap (stride =
window); the first token of a window is context only, so a window of w tokens scores w - 1; a last window of fewer than
two tokens is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slimexport.artifacts import Figure
from slimexport.errors import BadInputError
from slimexport.runtime import Decoder
from slimexport.verification.intervals import ratio_of_sums

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]
"""Called with tokens done and tokens in all."""

# Logits worked on at once: with 2^18 float32 all temporaries stay in the caches. Plain numpy in one thread takes 70 ms
# for 512 x 49152 logits and their dense counterpart; torch's threads meet at a barrier in every operation and took
# over a second beside other work.
_CHUNK = 1 << 18
# Below this a logit counts as masked (-inf); keeps -inf - -inf out of the KL divergence, and exp() of it is 0 anyway.
_MASKED = -1e4
_Z95 = 1.959964


@dataclass(frozen=True)
class Accuracy:
    """Sums per window, so that everything below can be recomputed and paired. NLL and KL are in nats.

    `kl` is KL(dense || shrunk), `agreements` counts positions whose most likely token is the same.
    """

    window: int
    tokens: NDArray[np.int64]  # scored tokens [windows]
    nll: NDArray[np.float64]  # of the shrunk graph, summed over the window [windows]
    baseline_nll: NDArray[np.float64] | None
    kl: NDArray[np.float64] | None
    agreements: NDArray[np.int64] | None

    @property
    def scored(self) -> int:
        return int(self.tokens.sum())

    @property
    def mean_nll(self) -> float:
        return float(self.nll.sum() / self.scored)

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean_nll)

    def ratio_interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of perplexity / dense, from the windows' paired differences.

        The log of the ratio is the mean difference of NLL per token; its standard error is that of a ratio of sums
        over windows (both graphs saw the same ones, so what makes a window hard cancels). None for a single window.
        """
        if self.baseline_nll is None or len(self.tokens) < 2:
            return None
        mean, error = ratio_of_sums(self.nll - self.baseline_nll, self.tokens)
        return math.exp(mean - _Z95 * error), math.exp(mean + _Z95 * error)

    def figures(self) -> tuple[Figure, ...]:
        how = f"{self.scored} tokens scored, window and stride {self.window}"
        if self.baseline_nll is None or self.kl is None or self.agreements is None:
            return (
                Figure("accuracy.perplexity", "perplexity", shrunk=self.perplexity, note=how),
                Figure("accuracy.nll", "nats/token", shrunk=self.mean_nll, note=how),
            )
        dense = float(self.baseline_nll.sum() / self.scored)
        low, high = self.ratio_interval() or (None, None)
        agreement = float(self.agreements.sum() / self.scored)
        return (
            Figure(
                "accuracy.perplexity",
                "perplexity",
                shrunk=self.perplexity,
                baseline=math.exp(dense),
                ratio=math.exp(self.mean_nll - dense),
                ratio_low=low,
                ratio_high=high,
                note=how,
            ),
            Figure(
                "accuracy.nll",
                "nats/token",
                shrunk=self.mean_nll,
                baseline=dense,
                ratio=self.mean_nll / dense if dense else None,
                note=how,
            ),
            Figure("accuracy.kl", "nats/token", shrunk=float(self.kl.sum() / self.scored), note="KL(dense || shrunk)"),
            Figure("accuracy.top1_agreement", "share", shrunk=agreement, better="higher", note="with the dense model"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data: definition, count, and the sums of every window."""

        def listed(values: NDArray[Any] | None) -> list[Any] | None:
            return None if values is None else values.tolist()

        return {
            "definition": "exp(mean NLL per token); first token of each window is not scored",
            "window": self.window,
            "stride": self.window,
            "windows": len(self.tokens),
            "scored_tokens": self.scored,
            "window_tokens": listed(self.tokens),
            "window_nll": listed(self.nll),
            "window_baseline_nll": listed(self.baseline_nll),
            "window_kl": listed(self.kl),
            "window_agreements": listed(self.agreements),
        }


def accuracy(
    shrunk: Decoder,
    baseline: Decoder | None,
    input_ids: NDArray[np.int64],
    window: int = 512,
    progress: Progress | None = None,
) -> Accuracy:
    """Runs both graphs over `input_ids` int64 [n], window by window, and never holds more than one window's logits.

    Raises BadInputError if there are fewer than two tokens, or a window longer than the model's positions.
    """
    ids = _one_dimensional(input_ids)
    done = 0

    def said() -> Iterator[Said]:
        nonlocal done
        for part in windows_of(ids, window):
            yield Said(part, _predictions(shrunk, part), None if baseline is None else _predictions(baseline, part))
            done += len(part)
            if progress:
                progress(done, len(ids))

    return compared(said(), window)


class Said(NamedTuple):
    """Of one window: its tokens [w], and the logits [w - 1, vocab] of both models for those that are predicted."""

    part: NDArray[np.int64]
    logits: NDArray[np.float32]
    baseline: NDArray[np.float32] | None


def compared(windows: Iterable[Said], window: int) -> Accuracy:
    """What both models said, of all or none of the windows with a baseline."""
    rows: list[tuple[int, float, float, float, int]] = []
    alone = True
    for part, logits, baseline in windows:
        targets = part[1:]
        alone = baseline is None
        if baseline is None:
            rows.append((len(targets), _nll(logits, targets), 0.0, 0.0, 0))
        else:
            rows.append((len(targets), *_compare(logits, baseline, targets)))
    tokens, nll, baseline_nll, kl, agreements = (np.array(column) for column in zip(*rows, strict=True))
    if alone:
        return Accuracy(window, tokens, nll, None, None, None)
    return Accuracy(window, tokens, nll, baseline_nll, kl, agreements)


def torch_perplexity(model: PreTrainedModel, input_ids: NDArray[np.int64] | torch.Tensor, window: int = 512) -> float:
    """The same perplexity of a torch model, on its device. Raises BadInputError for fewer than two tokens."""
    import torch

    ids = _one_dimensional(torch.as_tensor(input_ids).cpu().numpy())
    total, scored = 0.0, 0
    for part in windows_of(ids, window):
        with torch.no_grad():
            logits = model(torch.from_numpy(part)[None].to(model.device), use_cache=False).logits[0, :-1]
        total += _nll(logits.float().cpu().numpy(), part[1:])
        scored += len(part) - 1
    return math.exp(total / scored)


def windows_of(ids: NDArray[np.int64], window: int) -> Iterator[NDArray[np.int64]]:
    """The pieces that are scored."""
    if window < 2:
        raise BadInputError(f"A window of {window} tokens scores nothing: the first token is context.")
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        if len(part) >= 2:
            yield part


def _one_dimensional(input_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    ids = np.ascontiguousarray(input_ids, np.int64)
    if ids.ndim != 1 or len(ids) < 2:
        raise BadInputError(f"Perplexity needs at least two tokens in one row, not {list(ids.shape)}.")
    return ids


def _predictions(decoder: Decoder, part: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [w - 1, vocab] of the positions that predict a token of the window; shares the graph's memory."""
    logits, _ = decoder.forward(part[None])
    return logits[0, :-1]


def _chunks(count: int, vocabulary: int) -> Iterator[slice]:
    rows = max(1, _CHUNK // vocabulary)
    return (slice(start, start + rows) for start in range(0, count, rows))


@dataclass(frozen=True)
class _Softmax:
    """Logits x [r, vocab] as x - max(x) (float32), its exp (float32), and what follows from them in float64 [r].

    Terms are at most 1 and their rounding errors (6e-8 of each) are summed in float64: log-probabilities are right to
    about 1e-6, without a float64 copy of the vocabulary.
    """

    shifted: NDArray[np.float32]
    exponentials: NDArray[np.float32]
    sums: NDArray[np.float64]
    log_sums: NDArray[np.float64]
    first: NDArray[np.int64]  # most likely token

    @classmethod
    def of(cls, logits: NDArray[np.float32]) -> _Softmax:
        first = logits.argmax(-1)
        shifted = logits - np.take_along_axis(logits, first[:, None], 1)
        np.maximum(shifted, _MASKED, out=shifted)
        exponentials = np.exp(shifted)
        sums = exponentials.sum(-1, dtype=np.float64)
        return cls(shifted, exponentials, sums, np.log(sums), first)

    def nll(self, targets: NDArray[np.int64]) -> float:
        """Summed over rows."""
        wanted = np.take_along_axis(self.shifted, targets[:, None], 1)[:, 0].astype(np.float64)
        return float((self.log_sums - wanted).sum())


def _nll(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    """Summed NLL of `targets` [t] under `logits` [t, vocab]."""
    return sum(_Softmax.of(logits[c]).nll(targets[c]) for c in _chunks(*logits.shape))


def _compare(
    logits: NDArray[np.float32], dense_logits: NDArray[np.float32], targets: NDArray[np.int64]
) -> tuple[float, float, float, int]:
    """Summed over `targets` [t]: NLL of shrunk and dense, KL(dense || shrunk), count of equal first choices."""
    nll = dense_nll = divergence = 0.0
    agreements = 0
    for c in _chunks(*logits.shape):
        shrunk, dense = _Softmax.of(logits[c]), _Softmax.of(dense_logits[c])
        nll += shrunk.nll(targets[c])
        dense_nll += dense.nll(targets[c])
        agreements += int((shrunk.first == dense.first).sum())
        # sum p (log p - log q), where log p = u_dense - log Z_dense and log q = u_shrunk - log Z_shrunk
        terms = dense.shifted - shrunk.shifted
        terms *= dense.exponentials
        kl = terms.sum(-1, dtype=np.float64) / dense.sums - dense.log_sums + shrunk.log_sums
        divergence += float(np.maximum(kl, 0).sum())  # rounding may give -1e-9
    return nll, dense_nll, divergence, agreements
