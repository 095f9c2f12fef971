"""Fronts and recommendations against enumeration, and what a sweep shows."""

from __future__ import annotations

import itertools
import json
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from slimexport.artifacts import Figure, VerificationReport
from slimexport.config import RunConfig
from slimexport.errors import UsageError
from slimexport.progress import Progress
from slimexport.sweep import report, run
from slimexport.sweep.front import front, recommend
from slimexport.sweep.points import Point, checked_ratios, config_of, measured, run_name
from slimexport.sweep.run import Sweep


def point(ratio: float, mb: float, kl: float, ms: float | None = None, export: str = "onnx") -> Point:
    values = {"size.export_mb": mb, "accuracy.kl": kl} | ({"decode.tpot_ms": ms} if ms is not None else {})
    return Point(
        ratio,
        export,
        "onnx",
        "fp32" if export == "onnx" else "int8",
        run_name(ratio),
        values,
        dict.fromkeys(values, 0.5),
    )


POINTS = [
    point(0.1, 500, 0.05, 18), point(0.2, 450, 0.12, 16), point(0.3, 400, 0.30, 15), point(0.4, 380, 0.70, 14),
    point(0.1, 150, 0.06, 9, "onnx-int8"), point(0.2, 140, 0.13, 8, "onnx-int8"), point(0.3, 120, 0.31, 7, "onnx-int8"),
    point(0.4, 125, 0.72, 7.5, "onnx-int8"),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_nothing_beats(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = [point(i / 100, float(mb), float(kl)) for i, (mb, kl) in enumerate(rng.integers(0, 6, (12, 2)))]
    found = front(points, "size.export_mb")
    own = [(p.values["size.export_mb"], p.values["accuracy.kl"]) for p in points]

    def beaten(a: tuple[float, float]) -> bool:
        return any((b[0] < a[0] and b[1] <= a[1]) or (b[0] <= a[0] and b[1] < a[1]) for b in own)

    assert {p.ratio for p in found} == {p.ratio for p, at in zip(points, own, strict=True) if not beaten(at)}
    assert all(a.values["size.export_mb"] <= b.values["size.export_mb"] for a, b in itertools.pairwise(found))


def test_front_of_the_example() -> None:
    assert [p.name for p in front(POINTS, "size.export_mb")] == [
        "0.3 onnx-int8",
        "0.2 onnx-int8",
        "0.1 onnx-int8",
        "0.1 onnx",
    ]
    assert front([point(0.1, 1, 1)], "decode.tpot_ms") == []


@pytest.mark.parametrize(
    ("limits", "name", "words"),
    [
        (
            {"max_latency_ms": 8.5},
            "0.2 onnx-int8",
            "Of 3 points that keep decode.tpot_ms <= 8.5, 0.2 onnx-int8 has the best",
        ),
        ({"max_kl": 0.31}, "0.3 onnx-int8", "the fastest decoding"),
        ({"max_size_mb": 460}, "0.1 onnx-int8", "the best quality"),
        ({"max_size_mb": 460, "max_kl": 0.055}, None, "0.1 onnx comes nearest"),
        ({"max_latency_ms": 1}, None, "No point keeps decode.tpot_ms <= 1; 0.3 onnx-int8 comes nearest"),
    ],
)
def test_recommendation(limits: dict[str, float], name: str | None, words: str) -> None:
    found = recommend(POINTS, limits)
    assert found is not None
    assert (found.point.name if found.point else None) == name
    assert words in found.why


def test_recommendation_where_something_was_not_measured() -> None:
    assert recommend(POINTS, {}) is None
    timeless = [point(0.1, 500, 0.05), point(0.2, 450, 0.12)]
    found = recommend(timeless, {"max_latency_ms": 5})
    assert found is not None
    assert found.why == "No point has a number for decode.tpot_ms."
    smallest = recommend(timeless, {"max_kl": 0.2})
    assert smallest is not None
    assert "0.2 onnx has the smallest files" in smallest.why


def test_invalid_figures_are_left_out() -> None:
    figures = (
        Figure("size.export_mb", "MB", 400.0, 500.0),
        Figure("decode.tpot_ms", "ms", 1.0, 2.0, 0.5, valid=False, note="busy"),
        Figure("prefill.ttft_ms.16", "ms", 3.0, 4.0, 0.75),
    )
    made = measured(point(0.1, 0, 0), VerificationReport(figures))
    assert made.values == {"size.export_mb": 400.0, "prefill.ttft_ms.16": 3.0}
    assert made.ratios == {"size.export_mb": 0.8, "prefill.ttft_ms.16": 0.75}
    assert made.notes == ("not valid: decode.tpot_ms",)


def test_what_a_point_shares(tmp_path) -> None:  # type: ignore[no-untyped-def]
    made = config_of(RunConfig(model="m"), 0.3, tmp_path, measures=True)
    assert (made.ratio, made.costs, made.baseline_cache) == (0.3, tmp_path / "costs.json", tmp_path / "baselines")
    assert config_of(RunConfig(model="m", fast=True), 0.3, tmp_path, measures=False).costs is None
    assert config_of(RunConfig(model="m", baseline=False), 0.3, tmp_path, measures=False).baseline_cache is None


@pytest.mark.parametrize(
    ("codes", "gravest"), [((), 0), ((0, 3), 3), ((3, 4), 4), ((0, 1), 1), ((1, 3, 4), 1), ((0, 0), 0)]
)
def test_a_sweep_ends_as_the_gravest_of_its_runs(codes: tuple[int, ...], gravest: int) -> None:
    assert Sweep((), {}, dict(enumerate(codes)), "m").exit_code == gravest


@pytest.mark.parametrize("ended", [-9, 0, 3])
def test_a_process_that_was_killed_fails_its_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: int) -> None:
    done = subprocess.CompletedProcess([], ended, "", "")
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(run, "_one", lambda *_: ([], ended))
    monkeypatch.setattr("slimexport.reporting.load_report", lambda _: None)
    made = run._in_parallel({0.2: RunConfig(model="m")}, tmp_path, Progress(quiet=True), ["cuda:0", "cuda:1"])
    assert made[0.2][1] == (1 if ended < 0 else ended)
    if ended < 0:
        assert made[0.2][0][0].failed == "exit code -9"


def test_points_run_on_the_gpus_that_are_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run._devices(RunConfig(model="m")) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-7")
    devices = run._devices(RunConfig(model="m"))
    assert devices == ["2", "GPU-7"]
    seen: list[tuple[str, str]] = []

    def started(command: list[str], *, env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        recipe = json.loads(Path(command[command.index("--recipe") + 1]).read_text())
        seen.append((env["CUDA_VISIBLE_DEVICES"], recipe["device"]))
        return subprocess.CompletedProcess(command, 4, "", "Error: no.")

    monkeypatch.setattr(run.subprocess, "run", started)
    run._in_parallel({0.2: RunConfig(model="m")}, tmp_path, Progress(quiet=True), devices[:1])
    assert seen == [("2", "auto")]  # as the first point has it: either may come first when the sweep goes on


def test_a_crash_is_one_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel. Consider more")

    monkeypatch.setattr("slimexport.pipeline.run", broken)
    (found,), code = run._one(RunConfig(model="m"), tmp_path, Progress(quiet=True), None)
    assert (found.failed, code) == ("internal error: RuntimeError: no kernel", 1)


def test_the_prompt_length_that_there_is_has_a_column() -> None:
    figures = (Figure("prefill.ttft_ms.64", "ms", 9.0, valid=True), Figure("accuracy.kl", "nats/token", 0.1))
    made = measured(point(0.1, 500, 0.05), VerificationReport(figures))
    assert report.columns([made]) == [("accuracy.kl", "KL"), ("prefill.ttft_ms.64", "TTFT 64 (ms)")]
    assert ("prefill.ttft_ms.128", "TTFT 128 (ms)") not in report.columns([made])


@pytest.mark.parametrize("ratios", [(), (1.0,), (-0.1,), (0.1, 0.1)])
def test_ratios_that_are_none(ratios: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="--ratios"):
        checked_ratios(ratios)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)


def test_the_report_shows_all_and_the_command_that_makes_the_choice() -> None:
    evil = "<script>x</script>"
    failed = Point(0.5, "onnx", "onnx", "fp32", "ratio-0.5", failed=f"no memory {evil}")
    configs = {ratio: RunConfig(model=evil, ratio=ratio, seed=3) for ratio in (0.1, 0.2, 0.3, 0.4, 0.5)}
    made = Sweep((*POINTS, failed), configs, {0.1: 0, 0.5: 4}, evil)
    assert made.exit_code == 4
    advice = recommend(POINTS, {"max_latency_ms": 8.5})
    data = json.loads(json.dumps(report.to_json(made, advice)))
    assert data["recommendation"]["command"] == f"slimexport run '{evil}' --seed 3 --ratio 0.2 --precision int8 -o out/"
    assert data["fronts"]["size.export_mb"][0] == "0.3 onnx-int8"
    text = report.to_markdown(made, advice)
    assert "| 0.2 | onnx-int8 | \\*+ | 140 (0.500)" in text
    assert "failed: no memory" in text
    page = report.to_html(made, advice)
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.seen
    assert page.count("<svg") == 2
    assert "0.2 onnx-int8 has the best quality" in report.summary(made, advice, __import__("pathlib").Path("x"))
