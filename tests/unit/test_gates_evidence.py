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
from slimexport.gates.evidence import evidence, percentile_interval, questions_interval, student
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


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"threads": 1}, "the earlier run was measured with threads 1, this one with 8"),
        ({"provider": "cuda"}, "the earlier run was measured with provider cuda, this one with cpu"),
        ({"decode_tokens": 8}, "the earlier run was measured with decode_tokens 8, this one with 64"),
    ],
)
def test_times_of_other_settings_are_not_compared(changed: dict[str, object], why: str) -> None:
    report = timed([1.0] * 20, [1.0] * 20)
    settings = {"threads": 8, "provider": "cpu", "decode_tokens": 64, "decode_prompt_tokens": [128]}
    now, then = (replace(report, latency={**report.latency, **settings, **more}) for more in ({}, changed))
    gate = parse("earlier(decode.tpot_ms)<=1.2")
    assert [r.outcome for r in evaluate((gate,), now, earlier=Earlier(now))] == ["passed"]
    (result,) = evaluate((gate,), now, earlier=Earlier(then))
    assert (result.outcome, result.message) == ("failed", f"decode.tpot_ms earlier <= 1.2: {why}")


def test_a_task_of_other_questions_is_not_compared() -> None:
    figure = Figure("task.t.acc", "score", 0.5, better="higher")
    reports = [
        VerificationReport(
            (figure,),
            tasks={"t": {"questions": {"shrunk": {"acc": [1.0, 0.0] * count}}, "asked": {"limit": 2 * count}}},
        )
        for count in (500, 20)
    ]
    assert outcome("earlier(task.t.acc)>=0.8", reports[0], earlier=Earlier(reports[0])) == "passed"
    (result,) = evaluate((parse("earlier(task.t.acc)>=0.8"),), reports[0], earlier=Earlier(reports[1]))
    assert (result.outcome, result.message.partition(": ")[2]) == (
        "failed",
        "the earlier run was asked other questions",
    )


@pytest.mark.parametrize("n", [2, 10, 20, 50])
@pytest.mark.parametrize(("true", "bound"), [(0.9, 0.95), (0.95, 0.99), (0.5, 0.6), (0.98, 1.0)])
def test_a_share_that_is_too_low_is_seldom_taken_for_enough(n: int, true: float, bound: float) -> None:
    """Exact probability of a lower end at the bound, at most a half of what the interval may miss."""
    taken = 0.0
    for right in range(n + 1):
        low, high = questions_interval(np.array([1.0] * right + [0.0] * (n - right)), None, 0.05)
        assert low <= right / n <= high
        taken += math.comb(n, right) * true**right * (1 - true) ** (n - right) * (low >= bound)
    assert taken <= 0.025


@pytest.mark.parametrize("n", [4, 20, 50])
def test_a_few_questions_that_two_models_answer_alike_prove_nothing(n: int) -> None:
    """Nine in ten of what the dense model gets right: the exact probability that it is taken for nearly all."""
    taken = 0.0
    for right in range(n + 1):
        others = np.array([1.0] * n)
        low, _ = questions_interval(np.array([1.0] * right + [0.0] * (n - right)), others, 0.05)
        taken += math.comb(n, right) * 0.9**right * 0.1 ** (n - right) * (low >= 0.98)
    assert taken <= 0.025
    same = np.array([1.0, 0.0] * 2000)
    assert questions_interval(same, same, 0.05)[0] > 0.99


def test_scores_that_are_no_shares_have_an_interval_of_their_own_size() -> None:
    low, high = questions_interval(np.full(30, 40.0), None, 0.05)
    assert 30 < low < 40 <= high
    assert questions_interval(np.ones(1), None, 0.05) == (-math.inf, math.inf)


def tokens(runs: list[list[float]], share: float) -> VerificationReport:
    """Of tokens of all runs, as the figure is."""
    value = float(np.percentile(np.concatenate(runs), 100 * share))
    return VerificationReport(
        (Figure(f"decode.itl_ms.p{100 * share:g}", "ms", value),), latency={"itl_ms": {"shrunk": runs}}
    )


def test_a_percentile_is_that_of_all_tokens() -> None:
    """A fifth of the runs have a few slow tokens: the median of the runs' own percentiles knows nothing of them."""
    rng = np.random.default_rng(0)
    runs = (21 + rng.normal(0, 0.05, (40, 64))).tolist()
    assert outcome("decode.itl_ms.p99<=30", tokens(runs, 0.99)) == "passed"
    for run in runs[::5]:
        run[:4] = [200.0] * 4
    report = tokens(runs, 0.99)
    assert report.figures[0].shrunk == pytest.approx(200)
    assert outcome("decode.itl_ms.p99<=30", report) == "undecided"
    assert outcome("decode.itl_ms.p99<=20", report) == "failed"
    assert outcome("decode.itl_ms.p50<=30", tokens(runs, 0.5)) == "passed"
    assert outcome("decode.itl_ms.p50<=20", tokens(runs, 0.5)) == "failed"
    assert outcome("decode.itl_ms.p99<=30", tokens(runs[:2], 0.99)) == "undecided"


def test_intervals_of_percentiles_hold_the_true_one() -> None:
    """Runs differ as a whole, and half of them have slow tokens; 1 of 20 may miss."""
    rng = np.random.default_rng(1)

    def drawn(count: int) -> np.ndarray:
        made = rng.normal(20, 0.5, (count, 1)) + rng.normal(0, 0.2, (count, 32))
        slow = rng.random((count, 32)) < (rng.random((count, 1)) < 0.5) * 0.1
        return made + 30 * slow * rng.random((count, 32))

    for share in (0.5, 0.9):
        true = float(np.percentile(drawn(40_000), 100 * share))
        missed = 0
        for _ in range(200):
            found = percentile_interval(drawn(30).tolist(), share, 0.05)
            assert found is not None
            missed += not found.low <= true <= found.high
        assert missed <= 20  # 10 are expected (in the upper tail up to 14), with a standard deviation of 3


def test_what_lies_outside_of_its_own_interval_is_not_known() -> None:
    """Should a record not be that of its figure, neither outcome is claimed."""
    report = timed([1.0] * 20, [1.0] * 20)
    wrong = replace(report, figures=(replace(report.figures[0], shrunk=3.0),))
    assert outcome("decode.tpot_ms<=2", wrong) == "undecided"
    assert outcome("decode.tpot_ms>=2", wrong) == "undecided"


def test_loads_are_few_and_looked_at_once() -> None:
    report = VerificationReport(
        (Figure("load.seconds", "s", 1.0),),
        latency={"processes": {"shrunk": [{"load_seconds": value} for value in (0.99, 1.0, 1.01)]}},
    )
    for looks in (1, 4):
        assert outcome("load.seconds<=1.3", report, looks=looks) == "passed"
    (result,) = evaluate((parse("load.seconds<=1.1"),), report)
    assert "3 processes tell no more; a wider bound, or a tolerance, can be decided" in result.message


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
        ({"size.export_mb": {"max_ratio_to_baseline": 80, "unit": "%"}}, ["ratio(size.export_mb)<=80%"]),
        (
            {"decode.tpot_ms": {"max": 20, "unit": "ms", "min_speedup": 1.2}},
            ["decode.tpot_ms<=20ms", "speedup(decode.tpot_ms)>=1.2"],
        ),
        ("accuracy.top1_agreement >= 70%", ["accuracy.top1_agreement>=70%"]),
        ("memory.kv_bytes_per_token<=1048576", ["memory.kv_bytes_per_token<=1048576"]),
        ("ratio(accuracy.kl)>=0.9999999 -7%", ["ratio(accuracy.kl)>=0.9999999 -7%"]),
        ("decode.tokens_per_s>=9.5tokens/s -10%", ["decode.tokens_per_s>=9.5tokens/s -10%"]),
    ],
)  # fmt: skip
def test_ways_to_write_a_gate(given: object, spec: list[str]) -> None:
    gates = gates_of(given)
    assert [str(gate) for gate in gates] == spec
    assert [Gate.parse(str(gate)) for gate in gates] == list(gates)


def test_percent_of_what_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="it is not clear which is in %: write a line for each gate"):
        gates_of({"accuracy.top1_agreement": {"min": 90, "min_ratio_to_baseline": 0.95, "unit": "%"}})


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
