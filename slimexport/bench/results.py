"""What was measured, as figures with intervals, as a table, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from slimexport.artifacts import SCHEMA_VERSION
from slimexport.bench.settings import Settings, Subject
from slimexport.environment import environment
from slimexport.machine.rates import Rates
from slimexport.verification.interleaved import Samples
from slimexport.verification.intervals import defect, median, rounded

QUANTILES = (50, 90, 99)
_DRAWS = 2000


@dataclass(frozen=True)
class Measured:
    """One quantity of one model: the median over rounds, quantiles over everything, and its ratio to the first model's
    (time, or rate, over time or rate), with a confidence interval. `floor` is what the machine's rates would allow."""

    name: str
    unit: str
    value: float | None
    quantiles: dict[str, float] = field(default_factory=dict)
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    ratio_quantiles: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # ratio, low, high
    floor: float | None = None
    valid: bool = True
    note: str | None = None


@dataclass(frozen=True)
class BenchResult:
    """`models` are in the order in which they were named; `figures` has one list for each."""

    models: tuple[dict[str, Any], ...]
    figures: Mapping[str, tuple[Measured, ...]]
    settings: dict[str, Any]
    rates: Rates
    samples: dict[str, Any]
    environment: dict[str, Any]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def figure(self, model: str, name: str) -> Measured | None:
        return next((f for f in self.figures[model] if f.name == name), None)


def result(subjects: Mapping[str, Subject], settings: Settings, rates: Rates, samples: Samples) -> BenchResult:
    first = next(iter(subjects))
    rng = np.random.default_rng(settings.seed)
    figures = {
        name: tuple(_figures(name, first, subject, settings, rates, samples, rng)) for name, subject in subjects.items()
    }
    models = tuple(
        {"name": s.name, "kind": s.kind, "precision": s.precision, "streamed_bytes": s.streamed_bytes}
        for s in subjects.values()
    )
    raw = {
        "ttft_ms": _ms(samples.ttft), "itl_ms": _ms(samples.itl), "batch_ms": _ms(samples.batch),
        "joules_per_token": samples.joules,
        "orders": samples.orders, "warm_up": samples.warm_up, **samples.watched,
    }  # fmt: skip
    notes = (samples.busy + ": nothing was reported, repeat it on a quiet machine",) if samples.busy else ()
    return BenchResult(models, figures, asdict(settings), rates, raw, environment(), notes)


def _figures(
    name: str, first: str, subject: Subject, settings: Settings, rates: Rates, samples: Samples, rng: Any
) -> Sequence[Measured]:
    busy, own_first = samples.busy, name == first
    made = []
    read = subject.streamed_bytes
    for length, seconds in samples.ttft[name].items():
        own, others = [[s] for s in seconds], [[s] for s in samples.ttft[first][length]]
        made.append(_measured(f"prefill.ttft_ms.{length}", "ms", own, others, rng, busy, own_first))
    for past, runs in samples.itl[name].items():
        floor = 1e3 * read / rates.read_bytes_per_second if read and settings.provider == "cpu" else None
        made.append(
            _measured(f"decode.tpot_ms.{past}", "ms", runs, samples.itl[first][past], rng, busy, own_first, floor)
        )
    for past, joules in samples.joules[name].items():
        if joules:
            own, others = [[j] for j in joules], [[j] for j in samples.joules[first][past]]
            made.append(_measured(f"decode.joules_per_token.{past}", "J", own, others, rng, busy, own_first, scale=1))
    for size, seconds in samples.batch[name].items():
        tokens, other = size * settings.tokens, samples.batch[first][size]
        made.append(_rate(f"batch.tokens_per_s.{size}", tokens, seconds, other, busy, own_first))
    return made


def _measured(
    name: str,
    unit: str,
    runs: Sequence[Sequence[float]],
    first: Sequence[Sequence[float]],
    rng: np.random.Generator,
    busy: str | None,
    own_first: bool,
    floor: float | None = None,
    scale: float = 1e3,
) -> Measured:
    """`runs` are seconds [round][token]; `first` those of the first model, measured back to back, or the same ones.

    The first model is judged by how its times scatter, the others by their ratios to it.
    """
    own, other = ([scale * float(np.mean(run)) for run in each] for each in (runs, first))
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    why = busy or defect(own if own_first else ratios)
    if why:
        return Measured(name, unit, None, valid=False, note=why, floor=floor)
    found = median(ratios)
    pooled = scale * np.concatenate([np.asarray(run) for run in runs])
    return Measured(
        name,
        unit,
        value=float(np.median(own)),
        quantiles={f"p{q}": float(np.percentile(pooled, q)) for q in QUANTILES},
        ratio=found.value,
        ratio_low=found.low,
        ratio_high=found.high,
        ratio_quantiles={f"p{q}": _bootstrap(runs, first, q, rng) for q in QUANTILES},
        floor=floor,
    )


def _rate(
    name: str, tokens: int, seconds: Sequence[float], first: Sequence[float], busy: str | None, own_first: bool
) -> Measured:
    unit = "tokens/s"
    if not seconds or len(seconds) != len(first):
        return Measured(name, unit, None, valid=False, note="this kind of model is not measured in batches")
    ratios = [b / a for a, b in zip(seconds, first, strict=True)]
    if why := busy or defect(list(seconds) if own_first else ratios):
        return Measured(name, unit, None, valid=False, note=why)
    found = median(ratios)
    return Measured(name, unit, tokens / float(np.median(seconds)), {}, found.value, found.low, found.high)


def _bootstrap(
    runs: Sequence[Sequence[float]], first: Sequence[Sequence[float]], q: int, rng: np.random.Generator
) -> tuple[float, float, float]:
    """The ratio of two quantiles over all tokens, and its 95 % interval: rounds are drawn again, both models of a round
    together, since what disturbs one disturbs the other."""
    own, other = np.asarray(runs), np.asarray(first)
    whole = float(np.percentile(own, q) / np.percentile(other, q))
    drawn = rng.integers(0, len(own), (_DRAWS, len(own)))
    ratios = np.percentile(own[drawn].reshape(_DRAWS, -1), q, axis=1) / np.percentile(
        other[drawn].reshape(_DRAWS, -1), q, axis=1
    )
    low, high = np.percentile(ratios, (2.5, 97.5))
    return whole, float(low), float(high)


def _ms(seconds: Mapping[str, Mapping[int, Sequence[Any]]]) -> dict[str, dict[str, list[Any]]]:
    def one(value: Any) -> Any:
        return rounded([1e3 * v for v in value]) if isinstance(value, list) else rounded([1e3 * value])[0]

    return {name: {str(n): [one(v) for v in values] for n, values in by.items()} for name, by in seconds.items()}


def text(result: BenchResult) -> str:
    """One line a quantity, one column a model: the value, and in brackets its ratio to the first model's."""
    names = list(result.figures)
    rows = [["", *names]]
    rows.append(["kind, precision", *(f"{m['kind']}, {m['precision']}" for m in result.models)])
    for place, figure in enumerate(result.figures[names[0]]):
        unit = "" if figure.unit in figure.name else f" ({figure.unit})"
        rows.append([f"{figure.name}{unit}", *(_cell(result.figures[name][place]) for name in names)])
        if figure.floor:
            rows.append(["  x of the floor", *(_floor(result.figures[name][place]) for name in names)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
             for row in rows]  # fmt: skip
    rates = result.rates
    lines += [
        "",
        f"In brackets the ratio to {names[0]}: the median of {result.settings['rounds']} paired ones, its interval.",
        f"Floor: weights read once at {rates.read_bytes_per_second / 1e9:.1f} GB/s, measured with {rates.threads} "
        f"threads; products reach {rates.flops_per_second / 1e9:.0f} GFLOP/s here.",
    ]
    invalid = {f"{name}: {f.name}: {f.note}" for name in names for f in result.figures[name] if not f.valid}
    return "\n".join([*lines, *result.notes, *(sorted(invalid) if not result.notes else ())])


def _cell(figure: Measured) -> str:
    if figure.value is None or not figure.valid:
        return "invalid"
    brief = f"{figure.value:.4g}"
    if figure.ratio is None or figure.ratio == 1.0 or figure.ratio_low is None or figure.ratio_high is None:
        return brief
    return f"{brief} ({figure.ratio:.3f}, {figure.ratio_low:.3f}-{figure.ratio_high:.3f})"


def _floor(figure: Measured) -> str:
    if figure.value is None or not figure.floor or not math.isfinite(figure.floor):
        return "–"
    return f"{figure.value / figure.floor:.2f}"
