"""What becomes of a gate: passed or failed where its figure is known well enough to tell, undecided where not.

A time is measured with noise, and a pipeline that runs the same binary twice must not be told two things: a gate on one
is decided by an interval that is wrong once in a thousand decisions. Accuracy is the same at every run, but stands for
text that was not measured: there 95 % do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from slimexport.artifacts import Figure, VerificationReport
from slimexport.errors import UsageError, nearest
from slimexport.gates.declared import Gate
from slimexport.gates.evidence import Evidence, evidence, is_time

Outcome = Literal["passed", "failed", "undecided"]

TIME_ERROR = 0.001  # of all looks at one figure together
TEXT_ERROR = 0.05
MEASURED = ("provider", "threads")  # settings of a record of times that have to be alike
DECODED = (*MEASURED, "decode_prompt_tokens", "decode_tokens")
ROUNDS = ("prefill.", "decode.")  # figures that further rounds tell more of


@dataclass(frozen=True)
class GateResult:
    """A gate and what became of it. `low` and `high` are of the interval that it was decided by, where there is one;
    `undecidable` gates had no number to compare. `lost` ones fail the build: an undecided one does unless the config
    says `on_undecided: warn`."""

    gate: Gate
    value: float | None
    outcome: Outcome
    message: str  # one line: "decode.tpot_ms speedup 1.31 (1.29 to 1.33) >= 1.2"
    lost: bool
    low: float | None = None
    high: float | None = None
    undecidable: bool = False
    export: str = ""  # which of several exports it is about, where not the first: "onnx-int8"

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


@dataclass(frozen=True)
class Earlier:
    """What `earlier(FIGURE)` compares with. `no_times`: why its times are not comparable."""

    report: VerificationReport
    no_times: str = ""
    no_text: str = ""


@dataclass(frozen=True)
class _Missing:
    """Why there is no number; `noise`: it was measured, but too badly, and another try may do."""

    why: str
    noise: bool = False


def parse(spec: str) -> Gate:
    """`accuracy.kl<=0.2`, `ratio(accuracy.perplexity)<=1.5`, `speedup(decode.tpot_ms)>=1.2`; else UsageError."""
    try:
        return Gate.parse(spec)
    except ValueError as error:
        raise UsageError(str(error)) from error


def evaluate(
    gates: Sequence[Gate],
    report: VerificationReport,
    export: str = "",
    *,
    earlier: Earlier | None = None,
    undecided_fails: bool = True,
    looks: int = 1,
) -> tuple[GateResult, ...]:
    """Compares every gate with the report, in order; raises nothing. `export` names which one the report is about.

    Who measures more until it is decided looks more than once: `looks` times at most.
    """
    return tuple(_evaluate(gate, report, export, earlier, undecided_fails, looks) for gate in gates)


def lost(results: Sequence[GateResult]) -> tuple[GateResult, ...]:
    return tuple(result for result in results if result.lost)


def worth_more_runs(results: Sequence[GateResult]) -> bool:
    """Whether a time is undecided that further rounds may decide."""
    return any(r.outcome == "undecided" and r.gate.figure.startswith(ROUNDS) for r in results)


def _evaluate(
    gate: Gate,
    report: VerificationReport,
    export: str,
    earlier: Earlier | None,
    undecided_fails: bool,
    looks: int,
) -> GateResult:
    value = _value(gate, report, earlier)

    def result(outcome: Outcome, message: str, known: Evidence | None = None, undecidable: bool = False) -> GateResult:
        fails = outcome == "failed" or (outcome == "undecided" and undecided_fails)
        return GateResult(
            gate,
            None if isinstance(value, _Missing) else value,
            outcome,
            f"{export}: {message}" if export else message,
            fails,
            known.low if known else None,
            known.high if known else None,
            undecidable,
            export,
        )

    if isinstance(value, _Missing):
        return result("undecided" if value.noise else "failed", f"{describe(gate)}: {value.why}", undecidable=True)
    figure = report.figure(gate.figure)
    known = evidence(
        report,
        gate.figure,
        gate.of,
        _error(gate.figure, looks),
        higher_is_better=figure is not None and figure.better == "higher",
        earlier=earlier.report if earlier else None,
    )
    low, high = (min(known.low, value), max(known.high, value)) if known else (value, value)
    below, limit = gate.op == "<=", gate.limit
    said = describe(gate, value, known)
    if (high <= limit) if below else (low >= limit):
        return result("passed", said, known)
    if (low > limit) if below else (high < limit):
        return result("failed", f"{said} does not hold{_by_how_much(gate, value)}", known)
    assert known is not None
    return result("undecided", f"{said} is undecided: {_advice(known)}", known)


def _error(name: str, looks: int) -> float:
    if not is_time(name):
        return TEXT_ERROR
    return TIME_ERROR / looks if name.startswith(ROUNDS) else TIME_ERROR


def _by_how_much(gate: Gate, value: float) -> str:
    if not gate.limit:
        return ""
    percent = 100 * abs(value - gate.limit) / abs(gate.limit)
    digits = 0 if percent >= 10 else 1 if percent >= 0.1 else 4
    return f": {percent:.{digits}f} % too {'much' if gate.op == '<=' else 'little'}"


def _advice(known: Evidence) -> str:
    if known.of == "processes":
        return f"{known.count} processes tell no more; a wider bound, or a tolerance, can be decided"
    if known.of == "runs":
        return f"{known.count} runs tell no more; max_latency_runs allows more, a quiet machine needs fewer"
    more = "task_limit allows more" if known.of == "questions" else "eval_tokens allows more"
    return f"{known.count} {known.of} tell no more; {more}"


def _value(gate: Gate, report: VerificationReport, earlier: Earlier | None) -> float | _Missing:
    """The number to compare, or why there is none."""
    figure = report.figure(gate.figure)
    if figure is None:
        names = [f.name for f in report.figures]
        return _Missing(f"the report has no figure {gate.figure!r}.{nearest(gate.figure, names)}")
    if not figure.valid:
        return _Missing(f"the measurement is invalid{f' ({figure.note})' if figure.note else ''}", noise=True)
    if gate.of == "earlier":
        number = _to_earlier(gate, figure, report, earlier)
        if isinstance(number, _Missing):
            return number
    else:
        if gate.of in ("ratio", "speedup", "baseline") and figure.baseline is None and figure.ratio is None:
            return _Missing("the baseline was not measured")
        found = _of(figure, gate.of)
        if found is None:
            return _Missing(f"there is no number for {gate.of}{f' ({figure.note})' if figure.note else ''}")
        number = found
    return number if math.isfinite(number) else _Missing(f"the measurement is invalid ({number})")


def _to_earlier(
    gate: Gate, figure: Figure, report: VerificationReport, earlier: Earlier | None
) -> float | _Missing:  # fmt: skip
    if earlier is None:
        return _Missing("no earlier report is given (--against report.json)")
    if why := _not_comparable(gate.figure, report, earlier):
        return _Missing(why)
    before = earlier.report.figure(gate.figure)
    if before is None or not before.valid or before.shrunk is None:
        return _Missing("the earlier report has no such number")
    if figure.shrunk is None or before.shrunk == 0:
        return _Missing("there is no number for earlier")
    return figure.shrunk / before.shrunk


def _not_comparable(name: str, report: VerificationReport, earlier: Earlier) -> str:
    """Why a figure of two reports was not found in the same way; "" where it was."""
    if name.startswith("accuracy."):
        return earlier.no_text
    if name.startswith("task."):
        task = name.split(".", 2)[1]
        one, other = (of.tasks.get(task, {}).get("asked") for of in (report, earlier.report))
        return "" if one == other else "the earlier run was asked other questions"
    if not is_time(name):
        return ""
    for key in DECODED if name.startswith("decode.") else MEASURED:
        one, other = (of.latency.get(key) for of in (report, earlier.report))
        if one != other:
            return f"the earlier run was measured with {key} {other}, this one with {one}"
    return earlier.no_times


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


def describe(gate: Gate, value: float | None = None, known: Evidence | None = None) -> str:
    """`decode.tpot_ms speedup 1.31 (1.29 to 1.33) >= 1.2`; without a value the numbers are left out."""
    of = "" if gate.of == "shrunk" else f" {gate.of}"
    scale = 100.0 if gate.unit == "%" else 1.0
    number = "" if value is None else f" {_digits(scale * value, scale * gate.limit)}"
    if value is not None and known is not None:
        number += f" ({scale * known.low:.4g} to {scale * known.high:.4g})"
    return f"{gate.figure}{of}{number} {str(gate)[str(gate).index(gate.op) :].replace(gate.op, f'{gate.op} ')}"


def _digits(value: float, bound: float) -> str:
    """Four digits, or as many more as it takes to tell the value from the bound."""
    for digits in (4, 6, 9):
        text = f"{value:.{digits}g}"
        if value == bound or float(text) != bound:
            break
    return text
