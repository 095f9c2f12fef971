"""Intervals, the rule for invalid measurements, and what is measured in which order. No test asserts a time."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import groupby, pairwise
from math import comb

import numpy as np
import pytest

from slimexport.artifacts import Estimates
from slimexport.machine import rates, watch
from slimexport.verification import interleaved
from slimexport.verification import latency as latency_module
from slimexport.verification.intervals import defect, median, paired_figure, relative_iqr
from slimexport.verification.latency import measure_latency

TEXT = np.arange(1000)
ESTIMATES = Estimates(100, 80, 400, 300, 200, 4)
DENSE = Estimates(200, 160, 800, 600, 500, 8)


class FakeDecoder:
    """Answers with scripted times and writes down who was called with what."""

    provider, threads, precision, last_only, artifact, bits = "coreml", 2, "fp32", False, None, None
    placement: dict = {}  # noqa: RUF012

    def __init__(self, name, calls, seconds, max_positions=None):
        self.name, self.calls, self.seconds, self.max_positions = name, calls, seconds, max_positions

    def stepped(self, prompt, steps):
        if (len(prompt), steps) == (1, 0):
            self.calls.append((self.name, "untimed", 1))
            yield 0.0, 0
            return
        self.calls.append((self.name, len(prompt), steps, tuple(prompt[:3])))
        yield self.seconds * len(prompt), 0
        for token in range(steps):
            self.calls.append((self.name, "token", token))
            yield self.seconds, token


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """What else this machine does is none of these tests' business: times are scripted. Those of `Watch` watch it."""

    class Quiet(watch.Watch):
        busy = None

    monkeypatch.setattr(interleaved, "Watch", Quiet)


def test_bytes_of_a_token_by_precision():
    half = Estimates(100, 80, 200, 160, 0, 4, head_flops=40)  # 2 bytes each; 20 of 80 weights are lm_head
    assert latency_module.decode_bytes(half, 10, "fp32") == 80 * 4 + 20 * 4
    assert latency_module.decode_bytes(half, 10, "fp16") == 80 * 2 + 20 * 2
    assert latency_module.decode_bytes(half, 10, "int8") == 80 * 9.25 / 8 + 20 * 4
    assert latency_module.decode_bytes(half, 10, "int4-mixed") == (60 * 5.125 + 20 * 9.25) / 8 + 20 * 4
    assert latency_module.decode_bytes(half, 10, "int8", half=True) == 80 * 8.75 / 8 + 20 * 2
    q4 = latency_module.decode_bytes(half, 10, "int4-mixed", bits=(5.0, 8.5, 16.0))
    assert q4 == (60 * 5 + 20 * 8.5 + 20 * 16) / 8


def test_ideal_of_a_prompt_of_which_only_the_last_logits_are_made():
    own, dense = Estimates(1, 1, 4, 4, 60, 4, head_flops=20), Estimates(1, 1, 4, 4, 100, 4, head_flops=20)
    assert own.prefill_flops(8, all_logits=True) / dense.prefill_flops(8, all_logits=True) == 0.6
    assert own.prefill_flops(8, all_logits=False) / dense.prefill_flops(8, all_logits=False) == 340 / 660


def measured(runs=4, lengths=(8, 32), baseline=True, positions=None, **options):
    calls = []
    shrunk = FakeDecoder("shrunk", calls, 0.010, positions)
    dense = FakeDecoder("baseline", calls, 0.015) if baseline else None
    made = measure_latency(shrunk, dense, TEXT, prompt_lengths=lengths, decode_tokens=16, runs=runs, seed=0, **options)
    return made, calls


def test_figures_ratios_and_ideals():
    made, _ = measured(shrunk_estimates=ESTIMATES, baseline_estimates=DENSE)
    figures = {f.name: f for f in made.figures}
    assert list(figures) == [
        "prefill.ttft_ms.8",
        "prefill.ttft_ms.32",
        "decode.tpot_ms",
        "decode.itl_ms.p50",
        "decode.itl_ms.p90",
        "decode.itl_ms.p99",
        "decode.tokens_per_s",
    ]
    assert figures["prefill.ttft_ms.8"].shrunk == pytest.approx(80)
    assert figures["prefill.ttft_ms.8"].ideal == pytest.approx(200 / 500)
    tpot = figures["decode.tpot_ms"]
    assert (tpot.shrunk, tpot.baseline, tpot.ratio) == (pytest.approx(10), pytest.approx(15), pytest.approx(2 / 3))
    context = 128 + 15 / 2  # mean length of the cache that a decoded token reads
    assert tpot.ideal == pytest.approx((300 + 4 * context) / (600 + 8 * context))
    rate = figures["decode.tokens_per_s"]
    assert rate.better == "higher"
    assert rate.shrunk == pytest.approx(100)
    assert rate.ratio == pytest.approx(1.5)
    assert rate.ideal == pytest.approx(1 / tpot.ideal)
    assert all(f.valid for f in made.figures)
    json.dumps(made.details)
    assert np.median(made.details["tpot_ms"]["shrunk"]) == pytest.approx(tpot.shrunk)


def test_models_take_turns_on_the_same_prompt():
    made, calls = measured(runs=4, lengths=(8,))
    timed = [call for call in calls if call[1] not in ("untimed", "token")]
    pairs = list(zip(timed[::2], timed[1::2], strict=True))
    assert len(pairs) == (2 + 4) * 2  # two rounds of warm-up and four; one prompt length and decoding
    for first, second in pairs:
        assert {first[0], second[0]} == {"shrunk", "baseline"}
        assert first[1:] == second[1:]
    assert [order[0] for order in made.details["order"]] == ["shrunk", "baseline"] * 2
    assert [first[0] for first, _ in pairs[4::2]] == ["shrunk", "baseline"] * 2
    assert len({first[3] for first, _ in pairs[4::2]}) > 1  # another prompt in every round
    # Each TTFT is preceded by an untimed token of the same model.
    for before, call in pairwise(calls):
        if call[1] == 8:
            assert before == (call[0], "untimed", 1)
    assert calls == measured(runs=4, lengths=(8,))[1]
    # And they take turns every few tokens, in turned order, so that both have the same luck.
    tokens = [name for name, what, *_ in calls[-32:] if what == "token"]
    assert len(tokens) == 32
    turns = [name for name, of in groupby(tokens) for _ in range(len(list(of)) // interleaved.TURN)]
    assert sorted(turns) == ["baseline"] * 4 + ["shrunk"] * 4
    assert turns[:4] == [turns[0], turns[1], turns[1], turns[0]]


def test_warm_up_is_not_recorded():
    made, _ = measured(runs=3)
    assert [len(times) for times in made.details["ttft_ms"]["shrunk"].values()] == [3, 3]
    assert [len(run) for run in made.details["itl_ms"]["baseline"]] == [16] * 3


def test_without_baseline_and_without_runs():
    made, _ = measured(baseline=False)
    assert all(f.ratio is None and f.baseline is None and f.shrunk is not None for f in made.figures)
    made, calls = measured(runs=0)
    assert (made.figures, made.details, calls) == ((), {}, [])
    assert "latency_runs is 0" in made.notes[0]


def test_prompts_that_do_not_fit_are_left_out_with_a_note():
    made, _ = measured(lengths=(8, 32, 512), positions=40)
    assert [f.name for f in made.figures][:3] == ["prefill.ttft_ms.8", "prefill.ttft_ms.32", "decode.tpot_ms"]
    assert made.details["decode_prompt_tokens"] == 24
    assert made.notes == ("Prompts of 512 tokens do not fit the model's 40 positions.",)
    made, _ = measured(lengths=(8,), positions=16)
    assert [f.name for f in made.figures] == ["prefill.ttft_ms.8"]
    assert "Decoding 16 tokens" in made.notes[0]


@pytest.mark.parametrize(
    ("cpu_seconds", "all_seconds", "busy"),
    [
        (1.9, 1.95, False),
        (1.0, 2.0, True),
        (1.0, 1.05, False),  # ours alone, but not in parallel all the time
    ],
)
def test_on_a_busy_machine_nothing_counts(monkeypatch, cpu_seconds, all_seconds, busy):
    """Two threads, one second of wall clock."""

    class Clock:
        perf_counter = staticmethod(iter([0.0, 1.0]).__next__)
        process_time = staticmethod(iter([0.0, cpu_seconds]).__next__)

    monkeypatch.setattr(watch, "time", Clock)
    monkeypatch.setattr(watch, "_machine_seconds", iter([(0.0, 0.0), (all_seconds, 0.0)]).__next__)
    monkeypatch.setattr(interleaved, "Watch", watch.Watch)
    monkeypatch.setattr(FakeDecoder, "provider", "cpu")
    made, _ = measured()
    assert made.details["cpu_share"] == cpu_seconds / 2
    assert any("machine was busy" in note for note in made.notes) == busy
    assert {figure.valid for figure in made.figures} == {not busy}
    assert all("50% of their 2 cores" in (figure.note or "") for figure in made.figures) == busy


@pytest.mark.parametrize(
    ("machine_seconds", "throttled", "words"),
    [
        ((1.9, 0.2), 0.0, "gave 10% of its time to others"),
        ((2.6, 0.0), 0.0, "other work kept 0.7 of its 2 cores busy"),
        ((1.9, 0.0), 0.5, "a CPU quota held the runs up for 50% of the time"),
        ((1.9, 0.0), 0.0, None),
    ],
    ids=["steal", "load", "quota", "none"],
)
def test_other_reasons_why_a_machine_is_not_ours(monkeypatch, machine_seconds, throttled, words):
    class Clock:
        perf_counter = staticmethod(iter([0.0, 1.0]).__next__)
        process_time = staticmethod(iter([0.0, 1.9]).__next__)

    monkeypatch.setattr(watch, "time", Clock)
    monkeypatch.setattr(watch.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(watch, "default_threads", lambda: 2)
    monkeypatch.setattr(watch, "_machine_seconds", iter([(0.0, 0.0), machine_seconds]).__next__)
    monkeypatch.setattr(watch, "_throttled_seconds", iter([0.0, throttled]).__next__)
    with watch.Watch(2) as watched:
        pass
    assert watched.busy is None if words is None else words in watched.busy


def test_energy_is_a_figure_where_the_machine_tells(monkeypatch):
    class Meter:
        there, read = True, 0.0

        def joules(self):
            self.read += 8.0
            return self.read

    monkeypatch.setattr(interleaved, "Meter", Meter)
    made, _ = measured()
    figure = next(figure for figure in made.figures if figure.name == "decode.joules_per_token")
    tokens = made.details["decode_tokens"]
    assert figure.shrunk == figure.baseline == 8.0 * (1 + tokens / interleaved.TURN) / tokens  # read once a turn
    assert figure.ratio == 1
    assert "whole processor package" in figure.note
    monkeypatch.undo()
    assert "decode.joules_per_token" not in [figure.name for figure in measured()[0].figures]


def test_real_work_of_others_is_seen():
    """A process that does nothing but count, while this one waits."""
    code = "import time; end = time.perf_counter() + 3\nwhile time.perf_counter() < end: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as other, watch.Watch(1) as watched:
        other.wait()
    assert watched.found["others"] > 0.3
    assert "the machine was busy" in watched.busy


def test_warm_up_goes_on_while_a_model_gets_faster(monkeypatch):
    class Warming(FakeDecoder):
        def stepped(self, prompt, steps):
            self.seconds = max(0.01, self.seconds * 0.9)
            return super().stepped(prompt, steps)

    def rounds(decoder):
        return measure_latency(decoder, None, TEXT, prompt_lengths=(8,), decode_tokens=4, runs=2, seed=0).details[
            "warm_up_rounds"
        ]

    assert rounds(FakeDecoder("shrunk", [], 0.01)) == 2
    assert rounds(Warming("shrunk", [], 0.02)) == 4
    assert rounds(Warming("shrunk", [], 10.0)) == 5


def test_prompts_longer_than_the_text_repeat_it():
    rng = np.random.default_rng(0)
    assert latency_module._stretch(np.array([1, 2, 3]), 7, rng).tolist() == [1, 2, 3, 1, 2, 3, 1]


# ------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(("n", "rank"), [(5, 1), (6, 1), (8, 1), (9, 2), (10, 2), (12, 3), (20, 6), (30, 10)])
def test_median_interval_takes_the_textbook_ranks(n, rank):
    found = median(range(1, n + 1))
    assert (found.low, found.high) == (rank, n + 1 - rank)
    assert found.coverage == pytest.approx(1 - 2 * sum(comb(n, j) for j in range(rank)) / 2**n)
    assert n < 6 or found.coverage >= 0.95


def test_median_of_one_and_two():
    assert (median([3.0]).low, median([3.0]).high, median([3.0]).coverage) == (3, 3, 0)
    assert (median([3.0, 4.0]).value, median([3.0, 4.0]).coverage) == (3.5, 0.5)


def test_interval_covers_the_median_of_a_skewed_distribution():
    draws = np.random.default_rng(0).lognormal(0, 1, (4000, 10))
    hits = sum(found.low <= 1 <= found.high for found in map(median, draws))
    assert hits / 4000 == pytest.approx(1 - 2 * 11 / 1024, abs=0.01)


def test_what_makes_a_measurement_worthless():
    assert "2 runs" in str(defect([1.0, 1.0]))
    assert defect([1.0, 1.01, 0.99]) is None
    assert "spreads over" in str(defect([1.0, 1.0, 1.6, 1.7, 1.0, 1.7]))
    # The middle half is steady, the interval of so few runs is not.
    assert "confidence interval" in str(defect([0.6, 0.99, 1.0, 1.01, 1.02, 1.4]))
    assert defect([0.6, *np.linspace(0.98, 1.02, 20), 1.4]) is None
    assert relative_iqr([1, 2, 3, 4, 5]) == pytest.approx(2 / 3)


def test_a_slow_phase_of_the_machine_leaves_the_paired_ratio_alone():
    phase = np.array([1, 1, 1, 3, 3, 3, 3, 1, 1, 1])
    figure = paired_figure("x", "ms", 2.0 * phase, 4.0 * phase)
    assert (figure.ratio, figure.ratio_low, figure.ratio_high, figure.valid) == (0.5, 0.5, 0.5, True)
    assert "only the ratio is steady" in figure.note
    alone = paired_figure("x", "ms", 2.0 * phase, None)
    assert not alone.valid
    assert "spreads over" in alone.note


def test_an_outlier_does_not_move_the_ratio():
    shrunk = [1.0] * 9 + [50.0]
    figure = paired_figure("x", "ms", shrunk, [2.0] * 10)
    assert (figure.ratio, figure.valid) == (0.5, True)


def test_nothing_measured_is_invalid():
    figure = paired_figure("x", "ms", [], [])
    assert (figure.valid, figure.shrunk) == (False, None)


def test_floors_follow_from_what_the_machine_can_do(monkeypatch):
    monkeypatch.setattr(rates, "measured", lambda threads: rates.Rates(threads, 1e3, 1e5))
    monkeypatch.setattr(FakeDecoder, "provider", "cpu")
    made, _ = measured(shrunk_estimates=ESTIMATES, baseline_estimates=DENSE)
    figures = {f.name: f for f in made.figures}
    assert figures["prefill.ttft_ms.8"].floor == pytest.approx(1e3 * 200 * 8 / 1e5)
    context = 128 + 15 / 2
    assert figures["decode.tpot_ms"].floor == pytest.approx(1e3 * (300 + 4 * context) / 1e3)
    assert figures["decode.tokens_per_s"].floor is None


def test_more_rounds_until_they_are_enough():
    seen = []

    def enough(found):
        seen.append(found.details["runs"])
        return len(found.details["tpot_ms"]["shrunk"]) >= 12

    made, _ = measured(runs=3, enough=enough, at_most=80)
    assert seen == [3, 6, 12]
    assert made.details["runs"] == 12
    assert [len(times) for times in made.details["ttft_ms"]["baseline"].values()] == [12, 12]
    assert made.details["order"][:4] == [["shrunk", "baseline"], ["baseline", "shrunk"]] * 2
    assert measured(runs=3, enough=lambda _: False, at_most=10)[0].details["runs"] == 10
    assert measured(runs=3, enough=lambda _: False, at_most=0)[0].details["runs"] == 3


def test_of_quiet_and_busy_rounds_the_quiet_ones_count(monkeypatch):
    """The first four beside other work, the next four not, the last eight again."""
    said = iter(["busy", None, "busy"])

    class Watched(watch.Watch):
        @property
        def busy(self):
            return next(said)

    monkeypatch.setattr(interleaved, "Watch", Watched)
    monkeypatch.setattr(FakeDecoder, "provider", "cpu")
    made, _ = measured(runs=4, enough=lambda _: False, at_most=16)
    assert made.details["runs"] == 4
    assert all(figure.valid for figure in made.figures)


def test_where_a_gpu_computes_other_work_takes_no_rounds(monkeypatch):
    """What it does beside, the CPU has time for."""

    class Watched(watch.Watch):
        @property
        def busy(self):
            return "busy"

    monkeypatch.setattr(interleaved, "Watch", Watched)
    monkeypatch.setattr(FakeDecoder, "provider", "cuda")
    made, _ = measured(runs=4, enough=lambda _: False, at_most=16)
    assert made.details["runs"] == 16
    assert all(figure.valid for figure in made.figures)
