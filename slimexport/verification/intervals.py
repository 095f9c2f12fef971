"""Repeated, paired measurements: medians, their confidence intervals, and when a measurement is worth nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimexport.artifacts import Figure

# A measurement is marked invalid, and its gates do not count it as passed, when any of these is broken:
MIN_RUNS = 3  # fewer have no spread to judge by
MAX_RELATIVE_IQR = 0.25  # middle half of the ratios, over their median: above, the machine was doing something else
MAX_RELATIVE_HALF_WIDTH = 0.15  # of the confidence interval, over the median: above, a 15 % gain cannot be seen
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Median:
    """A median with a distribution-free confidence interval that covers the true one with probability `coverage`."""

    value: float
    low: float
    high: float
    coverage: float


def median(values: Sequence[float], confidence: float = CONFIDENCE) -> Median:
    """Median and its order-statistic interval [x_(k), x_(n-k+1)], with the largest k that covers `confidence`.

    The true median lies outside with probability 2 P(Binomial(n, 1/2) < k), whatever the distribution: timings are
    skewed and have outliers. Fewer than six values cannot reach 95 %; then it is the whole range, with its coverage
    1 - 2^(1-n).
    """
    ordered = np.sort(np.asarray(values, np.float64))
    n = len(ordered)
    k, outside = 1, 2.0 ** (1 - n)
    while 2 * k < n:
        wider = outside + 2 * comb(n, k) / 2**n
        if wider > 1 - confidence:
            break
        k, outside = k + 1, wider
    return Median(float(np.median(ordered)), float(ordered[k - 1]), float(ordered[n - k]), 1 - outside)


def ratio_of_sums(a: NDArray[Any], b: NDArray[Any]) -> tuple[float, float]:
    """sum(a) / sum(b) over two windows (or questions) or more, and its standard error, by the deviations a - r b
    (linearised): where both were measured on the same windows, what makes one hard cancels."""
    n, total = len(a), float(b.sum())
    ratio = float(a.sum()) / total
    return ratio, math.sqrt(float(((a - ratio * b) ** 2).sum()) * n / (n - 1)) / total


def relative_iqr(values: Sequence[float]) -> float:
    """Distance of the quartiles over the median."""
    low, middle, high = np.percentile(np.asarray(values, np.float64), [25, 50, 75])
    return float((high - low) / middle)


def defect(values: Sequence[float]) -> str | None:
    """Why these values (all positive) are no measurement, in words; None if they are one."""
    if len(values) < MIN_RUNS:
        return f"{len(values)} runs, {MIN_RUNS} are needed"
    if (spread := relative_iqr(values)) > MAX_RELATIVE_IQR:
        return f"middle half of the runs spreads over {spread:.1%} of the median, {MAX_RELATIVE_IQR:.0%} is the limit"
    found = median(values)
    if (half := (found.high - found.low) / 2 / found.value) > MAX_RELATIVE_HALF_WIDTH:
        return f"confidence interval of ±{half:.1%}, ±{MAX_RELATIVE_HALF_WIDTH:.0%} is the limit"
    return None


def paired_figure(
    name: str,
    unit: str,
    shrunk: Sequence[float],
    baseline: Sequence[float] | None,
    *,
    ideal: float | None = None,
    floor: float | None = None,
    better: str = "lower",
    pooled: tuple[float, float | None] | None = None,
) -> Figure:
    """A figure from one value per round for each model; `shrunk[i]` and `baseline[i]` were measured back to back.

    The ratio is the median of the paired ratios, which a slow phase of the machine leaves alone; it need not be the
    quotient of the two medians that stand beside it. `pooled` replaces those medians by values over all runs together.
    Validity is judged on the ratios where there is a baseline, else on the values.
    """
    if not len(shrunk):
        return Figure(name, unit, better=better, valid=False, note="not measured")
    headline = pooled or (float(np.median(shrunk)), None if baseline is None else float(np.median(baseline)))
    if baseline is None:
        why = defect(shrunk)
        return Figure(
            name,
            unit,
            shrunk=headline[0],
            better=better,
            floor=floor,
            valid=why is None,
            note=why or f"median of {len(shrunk)} runs",
        )
    ratios = [s / b for s, b in zip(shrunk, baseline, strict=True)]
    found, why = median(ratios), defect(ratios)
    note = why or f"median of {len(ratios)} paired ratios, {found.coverage:.3g} confidence"
    if why is None and (drift := relative_iqr(shrunk)) > MAX_RELATIVE_IQR:
        note += f"; single values spread over {drift:.0%}, only the ratio is steady"
    return Figure(
        name,
        unit,
        shrunk=headline[0],
        baseline=headline[1],
        ratio=found.value,
        ratio_low=found.low,
        ratio_high=found.high,
        ideal=ideal,
        floor=floor,
        better=better,
        valid=why is None,
        note=note,
    )


def rounded(values: Sequence[float]) -> list[float]:
    """To four significant digits, for the raw record of a run."""
    return [float(f"{value:.4g}") for value in values]
