"""The points of a sweep. One run directory per ratio holds all of its precisions, which share one pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slimexport.artifacts import Figure, VerificationReport
from slimexport.config import RunConfig
from slimexport.errors import ExitCode, UsageError
from slimexport.gates.figures import TTFT

REPORTS = ("sweep-report.json", "sweep.md", "sweep.html")
FIGURES = ("size.export_mb", "accuracy.perplexity", "accuracy.kl", "prefill.ttft_ms.128", "decode.tpot_ms",
           "memory.peak_rss_mb")  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One ratio in one precision of one target. `directory` is that of its run, in the sweep's; `values` are of the
    shrunk model, `ratios` to the dense one. `failed` says why there are none."""

    ratio: float
    export: str  # name in the run directory: "onnx-int8"
    target: str
    precision: str
    directory: str
    values: Mapping[str, float] = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)
    dense: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    failed: str = ""

    @property
    def name(self) -> str:
        return f"{self.ratio:g} {self.export}"


@dataclass(frozen=True)
class Sweep:
    """`configs` by ratio, of single runs without what the sweep shares; `codes` are the exit codes of the runs."""

    points: tuple[Point, ...]
    configs: Mapping[float, RunConfig]
    codes: Mapping[float, int]
    source: str

    @property
    def exit_code(self) -> int:
        """0, or the gravest that a run ended with: first of all what is our own fault."""
        return max(self.codes.values(), default=0, key=lambda code: (code == ExitCode.INTERNAL, code))


def run_name(ratio: float) -> str:
    return f"ratio-{ratio:g}"


def checked_ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    """In rising order. Raises UsageError for none, for two of one name, and for one that removes all."""
    if not ratios:
        raise UsageError("--ratios: give at least one, such as 0.1,0.2,0.3.")
    for ratio in ratios:
        if not 0 <= ratio < 1:
            raise UsageError(f"--ratios: {ratio:g} is not at least 0 and below 1.")
    if len({run_name(ratio) for ratio in ratios}) < len(ratios):
        raise UsageError(f"--ratios: one is named twice: {', '.join(f'{ratio:g}' for ratio in ratios)}.")
    return tuple(sorted(ratios))


def config_of(base: RunConfig, ratio: float, place: Path, measures: bool) -> RunConfig:
    """The config of one run: it shares measured costs and dense graphs with the others. Neither changes a byte of what
    it makes."""
    changes: dict[str, Any] = {"ratio": ratio}
    if measures and base.costs is None:
        changes["costs"] = place / "costs.json"
    if base.baseline and base.baseline_cache is None:
        changes["baseline_cache"] = place / "baselines"
    return base.model_copy(update=changes)


def measured(point: Point, report: VerificationReport) -> Point:
    """`point` with what the report says of it; invalid figures are left out, and named."""
    found = [figure for name in FIGURES if (figure := _figure(report, name)) is not None]
    valid = [figure for figure in found if figure.valid and figure.shrunk is not None]
    lost = [figure.name for figure in found if not figure.valid]
    ratios = {f.name: r for f in valid if (r := _ratio(f)) is not None}
    return replace(
        point,
        values={f.name: float(f.shrunk or 0.0) for f in valid},
        ratios=ratios,
        dense={f.name: f.baseline for f in valid if f.baseline is not None},
        notes=(f"not valid: {', '.join(lost)}",) if lost else (),
    )


def _figure(report: VerificationReport, name: str) -> Figure | None:
    """That of another prompt length, where the usual one was not measured."""
    found = report.figure(name)
    if found is None and name.startswith(TTFT):
        found = next((f for f in report.figures if f.name.startswith(TTFT)), None)
    return found


def _ratio(figure: Figure) -> float | None:
    if figure.ratio is not None:
        return figure.ratio
    return figure.shrunk / figure.baseline if figure.shrunk is not None and figure.baseline else None
