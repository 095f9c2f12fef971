"""Intervals of figures, what gates decide by them, and that noise alone decides nothing."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from slimexport.artifacts import Figure, VerificationReport
from slimexport.gates import decide, figures
from slimexport.gates.decide import Earlier, evaluate, parse
from slimexport.gates.declared import Gate, gates_of
from slimexport.gates.evidence import evidence, student
from slimexport.verification.intervals import paired_figure


def timed(shrunk: list[float], baseline: list[float], name: str = "decode.tpot_ms") -> VerificationReport:
    """A report of nothing but one time, as a run would have written it."""
    return VerificationReport(
        (paired_figure(name, "ms", shrunk, baseline),),
        latency={"tpot_ms": {"shrunk": shrunk, "baseline": baseline}},
    )


def text(own: list[float], dense: list[float], tokens: int = 511) -> VerificationReport:
    count = tokens * len(own)
    ratio = math.exp((sum(own) - sum(dense)) / count)
    return VerificationReport(
        (
            Figure(
                "accuracy.perplexity", "perplexity", math.exp(sum(own) / count), math.exp(sum(dense) / count), ratio
            ),
            Figure("accuracy.kl", "nats/token", 0.2),
        ),
        accuracy={
            "window_tokens": [tokens] * len(own),
            "window_nll": own,
            "window_baseline_nll": dense,
            "window_kl": [0.2 * tokens] * len(own),
            "window": 512,
            "text_sha256": "t",
        },
    )


def outcome(spec: str, report: VerificationReport, **more: object) -> str:
    (result,) = evaluate((parse(spec),), report, **more)  # type: ignore[arg-type]
    return result.outcome


# Two-sided quantiles from any table of Student's distribution.
@pytest.mark.parametrize(
    ("error", "degrees", "t"),
    [
        (0.05, 1, 12.7062), (0.05, 2, 4.3027), (0.05, 10, 2.2281), (0.001, 2, 31.599), (0.001, 9, 4.7809),
        (0.001, 120, 3.3735),
    ],
)  # fmt: skip
def test_student(error: float, degrees: int, t: float) -> None:
    assert student(error, degrees) == pytest.approx(t, rel=2e-4)


def test_a_time_is_decided_by_its_interval() -> None:
    rng = np.random.default_rng(0)
    dense = (20 + rng.normal(0, 0.4, 40)).tolist()
    report = timed((np.array(dense) * (1 + rng.normal(0, 0.01, 40))).tolist(), dense)
    assert outcome("ratio(decode.tpot_ms)<=1.02", report) == "passed"
    assert outcome("ratio(decode.tpot_ms)<=0.95", report) == "failed"
    assert outcome("ratio(decode.tpot_ms)<=1.0", report) == "undecided"  # whatever side the median is on
    assert outcome("ratio(decode.tpot_ms)<=1.0 +2%", report) == "passed"
    assert outcome("speedup(decode.tpot_ms)>=0.98", report) == "passed"
    assert outcome("speedup(decode.tpot_ms)>=1.06", report) == "failed"


def test_undecided_says_what_helps_and_loses_only_if_it_is_to() -> None:
    report = timed([1.0, 1.1, 0.9, 1.05] * 3, [1.0] * 12)
    (fails,) = evaluate((parse("ratio(decode.tpot_ms)<=1.01"),), report)
    (warns,) = evaluate((parse("ratio(decode.tpot_ms)<=1.01"),), report, undecided_fails=False)
    assert fails.lost
    assert not warns.lost
    assert "is undecided: 12 runs tell no more; max_latency_runs allows more" in fails.message
    assert decide.worth_more_runs((fails,))
    assert fails.low is not None
    assert fails.low < 1.01 < fails.high  # type: ignore[operator]


def test_the_same_binary_hardly_ever_fails_and_a_slower_one_is_caught() -> None:
    """Noise with outliers, all looks of a run taken: at 1.02 none of 400 fails; 5 % more is never passed."""
    rng = np.random.default_rng(1)
    ends: dict[float, list[str]] = {1.0: [], 1.05: []}
    for slower, found in ends.items():
        for _ in range(400):
            noise = rng.normal(0, 0.015, 80) + rng.exponential(0.03, 80) * (rng.random(80) < 0.1)
            shrunk = (slower * (1 + noise)).tolist()
            for runs in (10, 20, 40, 80):
                found.append(outcome("ratio(decode.tpot_ms)<=1.02", timed(shrunk[:runs], [1.0] * runs), looks=4))
                if found[-1] != "undecided":
                    break
    assert "failed" not in ends[1.0]
    assert "passed" not in ends[1.05]
    assert ends[1.05].count("failed") >= 0.95 * 400


def test_few_runs_have_an_interval_too() -> None:
    values = [1.0, 1.01, 0.99]
    found = evidence(timed(values, [1.0] * 3), "decode.tpot_ms", "ratio", 0.001)
    assert found is not None
    logs = np.log(values)
    half = 31.599 * logs.std(ddof=1) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx(
        (math.exp(logs.mean() - half), math.exp(logs.mean() + half)), rel=1e-3
    )


def test_accuracy_is_decided_by_the_windows() -> None:
    rng = np.random.default_rng(2)
    dense = rng.normal(1500, 200, 40)  # hard and easy windows: both models find them so
    own = dense + 511 * rng.normal(0.10, 0.05, 40)
    report = text(own.tolist(), dense.tolist())
    ratio = report.figures[0].ratio
    assert ratio is not None
    found = evidence(report, "accuracy.perplexity", "ratio", 0.05)
    assert found is not None
    error = (own - dense).std(ddof=1) / 511 / math.sqrt(40)  # of the mean of windows of one size
    assert math.log(found.high / ratio) == pytest.approx(student(0.05, 39) * error, rel=1e-6)
    assert outcome(f"ratio(accuracy.perplexity)<={ratio + 0.05}", report) == "passed"
    assert outcome(f"ratio(accuracy.perplexity)<={ratio - 0.05}", report) == "failed"
    assert outcome(f"ratio(accuracy.perplexity)<={ratio + 0.001}", report) == "undecided"
    # Nothing can be proved by one window, nor the plain perplexity by windows so different.
    assert outcome("ratio(accuracy.perplexity)<=9", text(own[:1].tolist(), dense[:1].tolist())) == "undecided"
    assert outcome(f"accuracy.perplexity<={report.figures[0].shrunk + 0.5}", report) == "undecided"  # type: ignore[operator]


def test_an_earlier_run() -> None:
    rng = np.random.default_rng(3)
    dense = rng.normal(1500, 200, 40)
    now, then = text((dense + 40).tolist(), dense.tolist()), text((dense + 50).tolist(), dense.tolist())
    assert outcome("earlier(accuracy.perplexity)<=1", now, earlier=Earlier(then)) == "passed"
    assert outcome("earlier(accuracy.perplexity)<=0.9", now, earlier=Earlier(then)) == "failed"
    times = (1 + rng.normal(0, 0.005, 40)).tolist()
    fast, slow = timed(times, times), timed([1.1 * value for value in times], times)
    assert outcome("earlier(decode.tpot_ms)<=1.02", slow, earlier=Earlier(fast)) == "failed"
    assert outcome("earlier(decode.tpot_ms)<=1.02", fast, earlier=Earlier(fast)) == "passed"
    (result,) = evaluate(
        (parse("earlier(decode.tpot_ms)<=1"),), fast, earlier=Earlier(fast, no_times="another machine")
    )
    assert (result.outcome, result.message) == ("failed", "decode.tpot_ms earlier <= 1: another machine")
    (result,) = evaluate((parse("earlier(decode.tpot_ms)<=1"),), fast)
    assert "no earlier report is given (--against report.json)" in result.message


def test_a_busy_machine_decides_nothing() -> None:
    report = timed([1.0] * 10, [1.0] * 10)
    busy = replace(report, figures=(replace(report.figures[0], valid=False, note="busy"),))
    assert outcome("ratio(decode.tpot_ms)<=2", busy) == "undecided"


@pytest.mark.parametrize(
    ("given", "spec"),
    [
        ({"decode.tpot_ms": {"max_ratio_to_baseline": 0.8}}, ["ratio(decode.tpot_ms)<=0.8"]),
        ({"decode.tpot_ms": {"max": 20, "unit": "ms", "tolerance": 0.05}}, ["decode.tpot_ms<=20ms +5%"]),
        (
            {"accuracy.kl": {"max": 0.2}, "decode.tpot_ms": {"min_speedup": 1.2}},
            ["accuracy.kl<=0.2", "speedup(decode.tpot_ms)>=1.2"],
        ),
        (
            ["accuracy.kl<=0.2", {"size.export_mb": {"max_ratio_to_earlier": 1}}],
            ["accuracy.kl<=0.2", "earlier(size.export_mb)<=1"],
        ),
        ("accuracy.top1_agreement >= 70%", ["accuracy.top1_agreement>=70%"]),
        ("decode.tokens_per_s>=9.5tokens/s -10%", ["decode.tokens_per_s>=9.5tokens/s -10%"]),
    ],
)  # fmt: skip
def test_ways_to_write_a_gate(given: object, spec: list[str]) -> None:
    gates = gates_of(given)
    assert [str(gate) for gate in gates] == spec
    assert [Gate.parse(str(gate)) for gate in gates] == list(gates)


@pytest.mark.parametrize(
    ("spec", "limit"),
    [("a<=10 +5%", 10.5), ("a>=10 -5%", 9.5), ("a>=70%", 0.7), ("a<=-2 +50%", -1.0), ("a<=2e-3", 0.002)],
)
def test_limit(spec: str, limit: float) -> None:
    assert Gate.parse(spec).limit == pytest.approx(limit)


def test_a_tolerance_that_narrows_is_an_error() -> None:
    with pytest.raises(ValueError, match="a tolerance widens the bound: \\+5%"):
        Gate.parse("a<=10 -5%")


def test_docs_list_every_figure() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gates.md").read_text(encoding="utf-8")
    for name, unit in figures.known(()).items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {unit} |"))
        assert f"`{name}`" in row
    for line in re.findall(r"^\| `([^`]+[<>]=[^`]+)` \| `([^`]+)` \|$", page, re.MULTILINE):
        assert gates_of(line[0]) == gates_of(yaml.safe_load(line[1])), line
