"""What a report holds, and report.json: every number of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimexport.artifacts import (
    BlockTrace,
    ExportArtifact,
    ModelSource,
    PruningPlan,
    Recovery,
    ShrunkCheckpoint,
    TextSource,
    VerificationReport,
    from_dict,
    read_json,
    to_dict,
)
from slimexport.errors import BadInputError
from slimexport.gates.decide import GateResult, lost

JSON_NAME = "report.json"


@dataclass(frozen=True)
class BlockSummary:
    """One block of the pruning trace without the kept indices (those are in prune.json)."""

    block: int
    attention_error_before: float
    attention_error: float
    ffn_error_before: float
    ffn_error: float
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PruningSummary:
    """Where the time of pruning went, and what every block lost."""

    blocks: tuple[BlockSummary, ...]
    seconds_forward: float
    seconds_hessian: float
    seconds_selection: float
    peak_memory_bytes: int
    seconds_curvature: float = 0.0
    seconds_allocation: float = 0.0
    seconds_fit: float = 0.0

    @classmethod
    def from_trace(
        cls, trace: tuple[BlockTrace, ...], seconds_curvature: float = 0.0, seconds_allocation: float = 0.0
    ) -> PruningSummary:
        blocks = tuple(
            BlockSummary(
                block=t.block,
                attention_error_before=t.attention_error_before,
                attention_error=t.attention_error,
                ffn_error_before=t.ffn_error_before,
                ffn_error=t.ffn_error,
                seconds=t.seconds,
                notes=t.notes,
            )
            for t in trace
        )
        return cls(
            blocks=blocks,
            seconds_forward=sum(t.seconds_forward for t in trace),
            seconds_hessian=sum(t.seconds_hessian for t in trace),
            seconds_selection=sum(t.seconds_selection for t in trace),
            peak_memory_bytes=max((t.peak_memory_bytes for t in trace), default=0),
            seconds_curvature=seconds_curvature,
            seconds_allocation=seconds_allocation,
            seconds_fit=sum(t.seconds_fit for t in trace),
        )


@dataclass(frozen=True)
class Report:
    """Everything about one run. `config` is RunConfig.model_dump(mode="json"); `seconds` is by stage.

    `exports` has the names of the run directory: "onnx", "baseline/onnx". `command` is what was typed last, where
    known; how to do it again follows from `config`.
    """

    source: ModelSource
    config: dict[str, Any]
    plan: PruningPlan
    checkpoint: ShrunkCheckpoint
    verification: VerificationReport
    gates: tuple[GateResult, ...] = ()
    pruning: PruningSummary | None = None  # None where nothing was pruned (ratio 0)
    recovery: Recovery | None = None  # None where the shrunk model was not trained
    calibration: TextSource | None = None
    evaluation: TextSource | None = None
    exports: Mapping[str, ExportArtifact] = field(default_factory=dict)
    others: Mapping[str, VerificationReport] = field(default_factory=dict)  # of the exports but the first
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    command: str | None = None

    @property
    def each(self) -> dict[str, VerificationReport]:
        """What was measured of every export, by its name in the run directory, the first one first."""
        first = next((name for name in self.exports if "/" not in name and name not in self.others), "")
        return {first: self.verification, **self.others}

    @property
    def passed(self) -> bool:
        """Whether no gate is lost; true without gates."""
        return not lost(self.gates)

    @property
    def headline(self) -> str:
        """`PASSED: all 2 gates held`, the verdict without the reasons."""
        total, gone = len(self.gates), lost(self.gates)
        undecided = sum(result.outcome == "undecided" for result in self.gates)
        if gone:
            word = "" if any(result.outcome == "failed" for result in gone) else " undecided"
            return (
                f"FAILED: {len(gone)} of {total} gates{word}"
                if total > 1
                else f"FAILED: the gate{word and ' is undecided'}"
            )
        if not total:
            return "PASSED: no gate was set, so nothing was required"
        if undecided:
            return f"PASSED: no gate failed, but {undecided} of {total} could not be decided"
        return f"PASSED: all {total} gates held" if total > 1 else "PASSED: the gate held"

    @property
    def verdict(self) -> str:
        """One line: the headline and, for every gate that did not pass, its name and why."""
        reasons = "; ".join(result.message for result in self.gates if not result.passed)
        line = f"{self.headline}{': ' if reasons else ''}{reasons}"
        return line if line.endswith((".", "?")) else f"{line}."


def to_json(report: Report) -> dict[str, Any]:
    """Strict JSON: figures that are not finite become null (their `note` says why)."""
    data = to_dict(report)
    gates = [{**vars(result), "gate": result.gate.model_dump()} for result in report.gates]
    first = {"schema_version": data.pop("schema_version"), "passed": report.passed, "verdict": report.verdict}
    strict = _strict({**first, **data, "gates": gates})
    assert isinstance(strict, dict)
    return strict


def load_report(place: Path) -> Report:
    """Reads `place`, a report.json or its directory; raises BadInputError where it is missing or not a report."""
    path = Path(place) / JSON_NAME if Path(place).is_dir() else Path(place)
    data = read_json(path)
    if not isinstance(data, dict):
        raise BadInputError(f"{path} is not a report.")
    return from_dict(Report, {k: v for k, v in data.items() if k not in ("passed", "verdict")}, str(path))


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    if isinstance(value, str | int | None):
        return value
    if hasattr(value, "model_dump"):
        return _strict(value.model_dump(mode="json"))
    item = getattr(value, "item", None)  # a NumPy or torch scalar that came along
    return _strict(item()) if callable(item) else str(value)
