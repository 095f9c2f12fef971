"""Gates: thresholds on figures of the report. A gate that cannot be decided fails, and says why."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from slimexport.artifacts import Figure, VerificationReport
from slimexport.config import Gate
from slimexport.errors import UsageError, nearest


@dataclass(frozen=True)
class GateResult:
    """A gate and what became of it. `undecidable` gates had no number to compare, and did not pass."""

    gate: Gate
    value: float | None
    passed: bool
    message: str  # one line: "decode.tpot_ms speedup 1.31 >= 1.2"
    undecidable: bool = False
    export: str = ""  # which of several exports it is about, where not the first: "onnx-int8"


def parse(spec: str) -> Gate:
    """`accuracy.kl<=0.2`, `ratio(accuracy.perplexity)<=1.5`, `speedup(decode.tpot_ms)>=1.2`; else UsageError."""
    try:
        return Gate.parse(spec)
    except ValueError as error:
        raise UsageError(str(error)) from error


def evaluate(gates: tuple[Gate, ...], report: VerificationReport, export: str = "") -> tuple[GateResult, ...]:
    """Compares every gate with the report, in order; raises nothing. `export` names which one the report is about."""
    found = (_evaluate(gate, report) for gate in gates)
    if not export:
        return tuple(found)
    return tuple(replace(result, message=f"{export}: {result.message}", export=export) for result in found)


def failed(results: tuple[GateResult, ...]) -> tuple[GateResult, ...]:
    return tuple(result for result in results if not result.passed)


def _evaluate(gate: Gate, report: VerificationReport) -> GateResult:
    value = _value(gate, report)
    if isinstance(value, str):
        return GateResult(gate, None, False, f"{describe(gate)}: {value}", undecidable=True)
    passed = value <= gate.bound if gate.op == "<=" else value >= gate.bound
    # A failed comparison is printed as it stands, with enough digits to be seen to be false.
    return GateResult(gate, value, passed, describe(gate, value) + ("" if passed else " does not hold"))


def _value(gate: Gate, report: VerificationReport) -> float | str:
    """The number to compare, or why there is none."""
    figure = report.figure(gate.figure)
    if figure is None:
        names = [f.name for f in report.figures]
        return f"the report has no figure {gate.figure!r}.{nearest(gate.figure, names)}"
    if not figure.valid:
        return f"the measurement is invalid{f' ({figure.note})' if figure.note else ''}"
    if gate.of in ("ratio", "speedup", "baseline") and figure.baseline is None and figure.ratio is None:
        return "the baseline was not measured"
    number = _of(figure, gate.of)
    if number is None:
        return f"there is no number for {gate.of}{f' ({figure.note})' if figure.note else ''}"
    return number if math.isfinite(number) else f"the measurement is invalid ({number})"


def _of(figure: Figure, of: str) -> float | None:
    if of == "shrunk":
        return figure.shrunk
    if of == "baseline":
        return figure.baseline
    ratio = figure.ratio
    if ratio is None and figure.shrunk is not None and figure.baseline:
        ratio = figure.shrunk / figure.baseline
    if of == "ratio" or ratio is None:
        return ratio
    # A speed-up above 1 is an improvement, also of a figure such as tokens per second.
    if figure.better == "higher":
        return ratio
    return 1 / ratio if ratio > 0 else None


def describe(gate: Gate, value: float | None = None) -> str:
    """`decode.tpot_ms speedup 1.31 >= 1.2`; without a value the number is left out."""
    of = "" if gate.of == "shrunk" else f" {gate.of}"
    number = "" if value is None else f" {_digits(value, gate.bound)}"
    return f"{gate.figure}{of}{number} {gate.op} {gate.bound:g}"


def _digits(value: float, bound: float) -> str:
    """Four digits, or as many more as it takes to tell the value from the bound."""
    for digits in (4, 6, 9):
        text = f"{value:.{digits}g}"
        if value == bound or float(text) != bound:
            break
    return text
