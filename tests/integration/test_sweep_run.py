"""A sweep on a tiny model: the bytes of single runs, a point that fails, a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from models import tiny_directory, tiny_text

from slimexport import pipeline
from slimexport.artifacts import sha256_tree
from slimexport.cli import main
from slimexport.config import make_config
from slimexport.errors import BadInputError
from slimexport.sweep.run import sweep


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("inputs")
    texts = [str(tiny_text(place / f"{name}.txt", 9000, seed=seed)) for seed, name in enumerate(("one", "two"))]
    return {
        "model": str(tiny_directory(place / "model")), "calibration": texts[0], "eval_text": texts[1],
        "calibration_tokens": 1024, "sequence_length": 64, "eval_tokens": 512, "eval_window": 64, "latency_runs": 0,
        "round_to": 8, "probe_tokens": 256,
    }  # fmt: skip


def words(options: dict[str, Any]) -> list[str]:
    named = {name: value for name, value in options.items() if name != "model"}
    flags = [word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["sweep", options["model"], *flags]


def call(*given: Any) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in given])
    return int(stop.value.code or 0)


def test_every_point_has_the_bytes_of_its_single_run(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Costs (of the allocation that measures) and dense graphs were shared, and change nothing."""
    out = tmp_path / "sweep"
    command = [*words(options), "--ratios", "0.4,0.2", "--precisions", "fp32,int8", "-o", out, "--max-kl", "9"]
    assert call(*command) == 0
    printed = capsys.readouterr().out
    assert "slimexport run" in printed
    assert (out / "costs.json").is_file()
    data = json.loads((out / "sweep-report.json").read_text())
    assert [point["name"] for point in data["points"]] == ["0.2 onnx", "0.2 onnx-int8", "0.4 onnx", "0.4 onnx-int8"]
    assert data["recommendation"]["point"] == "0.4 onnx-int8"
    assert (out / "sweep.html").is_file()
    single = tmp_path / "single"
    pipeline.run(make_config({**options, "ratio": 0.4, "precision": ("fp32", "int8")}), single)
    for part in ("checkpoint", "onnx", "onnx-int8", "baseline/onnx", "baseline/onnx-int8"):
        assert sha256_tree(out / "ratio-0.4" / part) == sha256_tree(single / part), part
    before = {path: path.stat().st_mtime_ns for path in out.glob("ratio-*/*/model.onnx.data")}
    assert call(*command, "--resume") == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("ratio-*/*/model.onnx.data")} == before
    assert call(*command) == 4, "a sweep is there already"
    assert call(*command, "--resume", "--seed", "5") == 4, "another one was begun"


def test_a_point_that_fails_does_not_stop_the_others(options: dict[str, Any], tmp_path: Path) -> None:
    """No KV group may go below one: at 99 % there is no legal plan."""
    config = make_config({**options, "fast": True, "allocation": "uniform"})
    made = sweep(config, (0.99, 0.2), tmp_path / "out")
    failed, fine = sorted(made.points, key=lambda point: -point.ratio)
    assert "0.99" in failed.failed or "ratio" in failed.failed
    assert fine.values["accuracy.kl"] > 0
    assert made.exit_code == 4
    assert dict(made.codes) == {0.2: 0, 0.99: 4}


def test_force_removes_no_inputs(options: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = make_config({**options, "fast": True})
    sweep(config, (0.2,), out)
    inside = out / "ratio-0.2" / "checkpoint"
    with pytest.raises(BadInputError, match=r"lies in .*, which --force would replace"):
        sweep(config.model_copy(update={"model": str(inside)}), (0.3,), out, force=True)
    assert (inside / "model.safetensors").is_file()


def test_a_killed_sweep_goes_on(options: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "slimexport.cli", *words(options), "--fast", "--ratios", "0.2,0.4", "-o", str(out)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 300
        while not (out / "ratio-0.4" / "onnx" / "export.json").is_file():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    first = (out / "ratio-0.4" / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    assert call(*words(options), "--fast", "--ratios", "0.2,0.4", "-o", out, "--resume") == 0
    assert (out / "ratio-0.4" / "checkpoint" / "model.safetensors").stat().st_mtime_ns == first
    assert len(json.loads((out / "sweep-report.json").read_text())["points"]) == 2


def test_what_is_there_is_left_alone(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(BadInputError, match="holds no sweep of slimexport; it is left alone"):
            sweep(make_config(options), (0.2,), tmp_path, force=force)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="is a file"):
        sweep(make_config(options), (0.2,), tmp_path / "file")
    assert call(*words(options), "--ratios", "a,b", "-o", tmp_path / "x") == 2
