"""How well a figure is known: confidence intervals from the raw record of a report.

Times: one value a round, shrunk and baseline back to back. The interval is that of the median by order statistics,
which takes no distribution for granted; where there are too few rounds for the confidence asked, it is Student's, of
the mean logarithm. Accuracy: sums over windows of text, both models on the same tokens; the standard error is that of
a ratio of sums over windows, and what makes a window hard for both cancels. Figures that are the same at every run
(bytes, nodes, differences of logits) have no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimexport.artifacts import VerificationReport
from slimexport.gates.declared import GateOf
from slimexport.gates.figures import TTFT
from slimexport.verification.intervals import median, ratio_of_sums

_GRID = 200_001
PERCENTILE = "decode.itl_ms.p"


@dataclass(frozen=True)
class Evidence:
    """The true value lies outside of [low, high] with the probability asked for; `of` says what was counted."""

    low: float
    high: float
    count: int
    of: str  # "runs", "processes", "windows of text" or "questions"

    def inverse(self) -> Evidence:
        low = 1 / self.high if self.high > 0 else -math.inf
        return Evidence(low, 1 / self.low if self.low > 0 else math.inf, self.count, self.of)


def is_time(name: str) -> bool:
    """Whether another run would measure it a little differently."""
    return name.startswith(("prefill.", "decode.", "load."))


def evidence(
    report: VerificationReport,
    name: str,
    of: GateOf,
    error: float,
    *,
    higher_is_better: bool = False,
    earlier: VerificationReport | None = None,
) -> Evidence | None:
    """Interval that misses the figure's true value with probability `error`; None where nothing is left to chance, or
    no record was kept.

    `earlier` is what `of` "earlier" compares with.
    """
    if of == "speedup":
        found = evidence(report, name, "ratio", error)
        return found if found is None or higher_is_better else found.inverse()
    if name.startswith("task."):
        return _of_task(report, name, of, error, earlier)
    return _of_times(report, name, of, error, earlier) if is_time(name) else _of_text(report, name, of, error, earlier)


# --------------------------------------------------------------------------------------------------------------- times


def _of_times(
    report: VerificationReport, name: str, of: GateOf, error: float, earlier: VerificationReport | None
) -> Evidence | None:
    if name.startswith(PERCENTILE):
        return _of_percentile(report, name, of, error, earlier)
    own, dense = runs(report, name, "shrunk"), runs(report, name, "baseline")
    counted = "processes" if name == "load.seconds" else "runs"
    if of == "earlier":
        before = runs(earlier, name, "shrunk") if earlier else []
        return _quotient(_interval(own, error / 2, counted), _interval(before, error / 2, counted))
    if of == "ratio":
        return _interval([a / b for a, b in zip(own, dense, strict=True)], error, counted) if dense else None
    return _interval(dense if of == "baseline" else own, error, counted)


def _quotient(a: Evidence | None, b: Evidence | None) -> Evidence | None:
    if a is None or b is None:
        return None
    high = a.high / b.low if b.low > 0 else math.inf
    return Evidence(a.low / b.high, high, min(a.count, b.count), a.of)


def _of_percentile(
    report: VerificationReport, name: str, of: GateOf, error: float, earlier: VerificationReport | None
) -> Evidence | None:
    """Of all tokens of all rounds together, as the figure is."""
    share = float(name.removeprefix(PERCENTILE)) / 100

    def interval(record: VerificationReport | None, model: str, error: float) -> Evidence | None:
        return percentile_interval(record.latency.get("itl_ms", {}).get(model, []) if record else [], share, error)

    if of == "earlier":
        return _quotient(interval(report, "shrunk", error / 2), interval(earlier, "shrunk", error / 2))
    if of == "ratio":
        return _quotient(interval(report, "shrunk", error / 2), interval(report, "baseline", error / 2))
    return interval(report, "baseline" if of == "baseline" else "shrunk", error)


def percentile_interval(runs: Sequence[Sequence[float]], share: float, error: float) -> Evidence | None:
    """Of what `share` of all values stay below, by Woodruff's method (JASA 47, 1952): values at shares as far apart as
    the share below the percentile is known. Tokens of a run are slow together, so that it is runs that are counted."""
    if not runs:
        return None
    if len(runs) == 1:
        return Evidence(-math.inf, math.inf, 1, "runs")
    each = [np.sort(np.asarray(run, np.float64)) for run in runs]
    values = np.sort(np.concatenate(each))
    count, at = len(values), float(np.percentile(values, 100 * share))
    below = ([np.searchsorted(run, at, side=side) / len(run) for run in each] for side in ("left", "right"))
    spread = max(float(np.std(shares, ddof=1)) for shares in below) / math.sqrt(len(each))
    # Where no run differs, as if every token were drawn by itself.
    half = student(error, len(each) - 1) * max(spread, math.sqrt(share * (1 - share) / count))
    low, high = share - half, share + half
    return Evidence(
        float(values[max(math.ceil(low * count) - 1, 0)]) if low > 0 else -math.inf,
        float(values[min(math.ceil(high * count), count - 1)]) if high < 1 else math.inf,
        len(each),
        "runs",
    )


def runs(report: VerificationReport, name: str, model: str) -> list[float]:
    """One value a round of `model` ("shrunk" or "baseline"), in the figure's unit; none where it was not measured.
    Percentiles are of all rounds together: `_of_percentile`."""
    record = report.latency
    if name.startswith(TTFT):
        return list(record.get("ttft_ms", {}).get(model, {}).get(name.removeprefix(TTFT), []))
    if name in ("decode.tpot_ms", "decode.tokens_per_s"):
        found = record.get("tpot_ms", {}).get(model, [])
        return list(found) if name == "decode.tpot_ms" else [1e3 / value for value in found]
    if name == "decode.joules_per_token":
        return [value for values in record.get("joules_per_token", {}).get(model, {}).values() for value in values]
    if name == "load.seconds":
        said = record.get("processes", {}).get(model, [])
        return [float(each["load_seconds"]) for each in said if "load_seconds" in each]
    return []


def _interval(values: Sequence[float], error: float, counted: str) -> Evidence | None:
    """Of the median; of a single value nothing is known."""
    if not values:
        return None
    if len(values) == 1:
        return Evidence(-math.inf, math.inf, 1, counted)
    if 2.0 ** (1 - len(values)) <= error:
        found = median(values, 1 - error)
        return Evidence(found.low, found.high, len(values), counted)
    logs = np.log(np.asarray(values, np.float64))
    half = student(error, len(values) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(values))
    return Evidence(math.exp(logs.mean() - half), math.exp(logs.mean() + half), len(values), counted)


@cache
def student(error: float, degrees: int) -> float:
    """t that Student's distribution exceeds in absolute value with probability `error`.

    With t = sqrt(degrees) / tan(a), that probability is the share of the integral of sin^(degrees - 1) from 0 to a in
    the one from 0 to pi / 2.
    """
    angles = np.linspace(0, math.pi / 2, _GRID)
    density = np.sin(angles) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = float(np.interp(error * below[-1], below, angles))
    return math.sqrt(degrees) / math.tan(angle)


# ---------------------------------------------------------------------------------------------------------------- text

_SUMS = {
    "accuracy.perplexity": "window_nll",
    "accuracy.nll": "window_nll",
    "accuracy.kl": "window_kl",
    "accuracy.top1_agreement": "window_agreements",
}


def _of_text(
    report: VerificationReport, name: str, of: GateOf, error: float, earlier: VerificationReport | None
) -> Evidence | None:
    key, record = _SUMS.get(name), report.accuracy
    own, tokens = _windows(record, key), _windows(record, "window_tokens")
    if key is None or own is None or tokens is None:
        return None
    dense = _windows(record, "window_baseline_nll") if key == "window_nll" else None
    if of == "baseline":
        own = dense
    other = dense if of == "ratio" else _windows(earlier.accuracy, key) if of == "earlier" and earlier else None
    if own is None or (other is None and of in ("ratio", "earlier")):
        return None
    perplexity = name == "accuracy.perplexity"
    if other is None:
        low, high = sums_interval(own, tokens, error)
    elif perplexity:
        low, high = sums_interval(own - other, tokens, error)
    else:
        low, high = sums_interval(own, other, error)
    if perplexity:
        low, high = _exp(low), _exp(high)
    return Evidence(low, high, len(own), "windows of text")


def _of_task(
    report: VerificationReport, name: str, of: GateOf, error: float, earlier: VerificationReport | None
) -> Evidence | None:
    """Both models were asked the same questions, and so was the earlier one, if there were as many."""
    own = _questions(report, name, "baseline" if of == "baseline" else "shrunk")
    if own is None:
        return None
    other = None
    if of in ("ratio", "earlier"):
        other = _questions(report, name, "baseline") if of == "ratio" else _questions(earlier, name, "shrunk")
        if other is None or len(other) != len(own):
            return None
    return Evidence(*questions_interval(own, other, error), len(own), "questions")


def _questions(report: VerificationReport | None, name: str, model: str) -> NDArray[np.float64] | None:
    task, _, metric = name.removeprefix("task.").rpartition(".")
    scores = report.tasks.get(task, {}).get("questions", {}).get(model, {}).get(metric) if report else None
    return None if scores is None else np.asarray(scores, np.float64)


def _windows(record: dict[str, Any], key: str | None) -> NDArray[np.float64] | None:
    values = record.get(key) if key else None
    return None if values is None else np.asarray(values, np.float64)


def questions_interval(
    scores: NDArray[np.float64], others: NDArray[np.float64] | None, error: float
) -> tuple[float, float]:
    """Of the mean score, or of its ratio to that of another model's `others` on the same questions.

    A question of either outcome is added (of the two models each does better on one), as Agresti and Coull do for
    shares (The American Statistician 52, 1998): a few questions that all came out alike have no spread, and prove
    nothing by that.
    """
    if len(scores) < 2 or (others is not None and others.sum() <= 0):
        return -math.inf, math.inf
    both = scores if others is None else np.concatenate([scores, others])
    least, most = min(0.0, float(both.min())), max(1.0, float(both.max()))
    added = np.append(scores, [least, most])
    if others is not None:
        return sums_interval(added, np.append(others, [most, least]), error)
    low, high = sums_interval(added, np.ones_like(added), error)
    return max(low, least), min(high, most)


def sums_interval(a: NDArray[np.float64], b: NDArray[np.float64], error: float) -> tuple[float, float]:
    """Of sum(a) / sum(b) over windows, by Student's distribution."""
    if len(a) < 2 or b.sum() <= 0:
        return -math.inf, math.inf
    ratio, spread = ratio_of_sums(a, b)
    half = student(error, len(a) - 1) * spread
    return ratio - half, ratio + half


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
