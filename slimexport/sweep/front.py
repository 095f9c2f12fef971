"""Which points no other one beats, and which of them to take under a limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from slimexport.sweep.points import Point

QUALITY = ("accuracy.kl", "accuracy.perplexity")  # the first that was measured
COSTS = ("size.export_mb", "decode.tpot_ms")
LIMITS = {
    "max_latency_ms": "decode.tpot_ms",
    "max_kl": "accuracy.kl",
    "max_size_mb": "size.export_mb",
}


@dataclass(frozen=True)
class Recommendation:
    """`point` is None where none keeps the limits; `why` is one line."""

    point: Point | None
    why: str


def quality_of(points: Sequence[Point]) -> str | None:
    return next((name for name in QUALITY if any(name in point.values for point in points)), None)


def front(points: Sequence[Point], cost: str) -> list[Point]:
    """Those that no other one beats in `cost` and quality (lower is better in both), by rising cost. Of equal points
    all are kept."""
    quality = quality_of(points)
    known = [point for point in points if quality and quality in point.values and cost in point.values]

    def beaten(point: Point) -> bool:
        own = point.values[cost], point.values[str(quality)]
        others = [(other.values[cost], other.values[str(quality)]) for other in known]
        return any(a <= own[0] and b <= own[1] and (a, b) != own for a, b in others)

    return sorted((point for point in known if not beaten(point)), key=lambda point: point.values[cost])


def recommend(points: Sequence[Point], limits: Mapping[str, float]) -> Recommendation | None:
    """None without limits. Under a bound on time or size the best in quality; under one on quality alone the fastest,
    or the smallest where time was not measured."""
    if not limits:
        return None
    bounds = {LIMITS[name]: bound for name, bound in limits.items()}
    said = ", ".join(f"{name} <= {bound:g}" for name, bound in bounds.items())
    unknown = [name for name in bounds if not any(name in point.values for point in points)]
    if unknown:
        return Recommendation(None, f"No point has a number for {', '.join(unknown)}.")
    keeping = [p for p in points if all(name in p.values and p.values[name] <= bound for name, bound in bounds.items())]
    if not keeping:
        worst: Callable[[Point], float] = lambda p: max(  # noqa: E731
            p.values.get(name, float("inf")) / bound if bound else float("inf") for name, bound in bounds.items()
        )
        nearest = min(points, key=worst)
        return Recommendation(
            None, f"No point keeps {said}; {nearest.name} comes nearest ({_numbers(nearest, bounds)})."
        )
    quality = quality_of(points)
    if quality and set(bounds) - set(QUALITY):
        order, what = quality, "the best quality"
    elif any("decode.tpot_ms" in point.values for point in keeping):
        order, what = "decode.tpot_ms", "the fastest decoding"
    else:
        order, what = "size.export_mb", "the smallest files"
    best = min(keeping, key=lambda p: (p.values.get(order, float("inf")), p.values.get("size.export_mb", 0.0)))
    return Recommendation(best, f"Of {len(keeping)} points that keep {said}, {best.name} has {what} "
                                f"({_numbers(best, {**bounds, order: 0.0})}).")  # fmt: skip


def _numbers(point: Point, names: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {point.values[name]:.4g}" for name in names if name in point.values)
