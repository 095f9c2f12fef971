"""Gates: what passes, what fails, and that nothing undecidable passes."""

from __future__ import annotations

import math

import pytest

from slimexport.artifacts import Figure, VerificationReport
from slimexport.errors import UsageError
from slimexport.gates.decide import evaluate, lost, parse
from slimexport.gates.declared import Gate

REPORT = VerificationReport(
    (
        Figure("accuracy.perplexity", "", 30.0, 24.0, 1.25),
        Figure("accuracy.kl", "nats", 0.2),
        Figure("decode.tpot_ms", "ms", 12.0, 15.0, 0.8),
        Figure("decode.tokens_per_s", "tokens/s", 80.0, 64.0, 1.25, better="higher"),
        Figure("size.export_mb", "MB", 400.0, 500.0),  # the ratio follows from the two
        Figure("prefill.ttft_ms.128", "ms", 90.0, 100.0, 0.9, valid=False, note="spread 40 %"),
        Figure("memory.peak_rss_mb", "MB", 800.0),
        Figure("broken", "", math.nan, 1.0, math.nan),
        Figure("nothing", "", 0.0, 1.0, 0.0),
    )
)


def one(spec: str):
    (result,) = evaluate((parse(spec),), REPORT)
    return result


@pytest.mark.parametrize(
    ("spec", "value", "passed"),
    [
        ("accuracy.kl<=0.2", 0.2, True),  # the bound itself holds, in both directions
        ("accuracy.kl>=0.2", 0.2, True),
        ("accuracy.kl<=0.19", 0.2, False),
        ("baseline(accuracy.perplexity)<=25", 24.0, True),
        ("ratio(accuracy.perplexity)<=1.2", 1.25, False),
        ("ratio(size.export_mb)<=0.8", 0.8, True),
        ("speedup(decode.tpot_ms)>=1.25", 1.25, True),
        ("speedup(decode.tpot_ms)>=1.3", 1.25, False),
        ("speedup(decode.tokens_per_s)>=1.25", 1.25, True),  # higher is better: the ratio is the speed-up
    ],
)
def test_comparison(spec: str, value: float, passed: bool) -> None:
    result = one(spec)
    assert result.value == pytest.approx(value)
    assert result.passed is passed
    assert not result.undecidable


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("prefill.ttft_ms.128<=1000", "the measurement is invalid (spread 40 %)"),
        ("accuracy.kll<=1", "no figure 'accuracy.kll'. Did you mean 'accuracy.kl'?"),
        ("ratio(memory.peak_rss_mb)<=9", "the baseline was not measured"),
        ("speedup(memory.peak_rss_mb)>=0.1", "the baseline was not measured"),
        ("baseline(memory.peak_rss_mb)<=9000", "the baseline was not measured"),
        ("broken<=1", "invalid (nan)"),
        ("ratio(broken)<=1", "invalid (nan)"),
        ("speedup(nothing)>=1", "there is no number for speedup"),
    ],
)
def test_undecidable_fails(spec: str, why: str) -> None:
    result = one(spec)
    assert result.lost
    assert result.outcome == ("undecided" if why.startswith("the measurement is invalid (spread") else "failed")
    assert result.undecidable
    assert result.value is None
    assert why in result.message


def test_message_is_one_line_with_value_and_bound() -> None:
    assert one("speedup(decode.tpot_ms)>=1.2").message == "decode.tpot_ms speedup 1.25 >= 1.2"
    assert one("accuracy.kl<=0.19").message == "accuracy.kl 0.2 <= 0.19 does not hold: 5.3 % too much"


def test_a_near_miss_is_printed_with_enough_digits() -> None:
    report = VerificationReport((Figure("x", "", 1.20004),))
    (result,) = evaluate((Gate(figure="x", bound=1.2),), report)
    assert result.message == "x 1.20004 <= 1.2 does not hold: 0.0033 % too much"


def test_lost_keeps_the_order() -> None:
    results = evaluate(tuple(map(parse, ("accuracy.kl<=0.1", "accuracy.kl<=9", "nope<=1"))), REPORT)
    assert [r.gate.figure for r in lost(results)] == ["accuracy.kl", "nope"]
    assert evaluate((), REPORT) == ()


@pytest.mark.parametrize(
    "spec",
    ["", "accuracy.kl", "accuracy.kl<0.2", "accuracy.kl==0.2", "<=1", "ratio()<=1", "ratio(a(b))<=1", "a<=b", "a<=nan",
     "a<=inf", "a<=1<=2", "a b c", "rato(a)<=1"],
)  # fmt: skip
def test_malformed_spec_is_wrong_usage(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(spec)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_unknown_of_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'ratio'"):
        parse("rato(accuracy.perplexity)<=1.5")


@pytest.mark.parametrize("spec", ["accuracy.kl<=0.2", "ratio(a.b)<=1.5", "speedup(decode.tpot_ms)>=1.2", "a<=1e-06"])
def test_spec_round_trip(spec: str) -> None:
    assert str(parse(spec)) == spec
    assert parse(f"  {spec.replace('<=', ' <= ')} ") == parse(spec)
