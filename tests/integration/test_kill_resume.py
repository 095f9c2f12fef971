"""SIGKILL in the middle of pruning and of export, then --resume: the same bytes as a run that nobody touched."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from models import tiny_directory, tiny_text

from slimexport.artifacts import sha256_tree

BLOCKS = 16


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("inputs")
    model = tiny_directory(place / "model", "qwen3", num_hidden_layers=BLOCKS, intermediate_size=320)
    text, evaluation = (tiny_text(place / f"{n}.txt", 9000, seed=i) for i, n in enumerate(("cal", "eval")))
    options = {"calibration": text, "eval-text": evaluation, "calibration-tokens": 8192, "sequence-length": 64,
               "eval-tokens": 128, "eval-window": 64, "latency-runs": 0, "ratio": 0.35,
               "group-size-start": 1}  # fmt: skip
    words = [w for k, v in options.items() for w in (f"--{k}", str(v))]
    return [sys.executable, "-m", "slimexport.cli", "run", str(model), *words, "-o"]


def start(command: list[str], out: Path, *more: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(out), *more], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[bytes]) -> str:
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err.decode()
    return err.decode()


def kill_when(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, (process.stderr.read().decode() if process.stderr else "") + "ended too soon"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def result(out: Path) -> dict[str, dict[str, str]]:
    return {name: sha256_tree(out / name) for name in ("checkpoint", "onnx", "baseline/onnx")}


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    out = tmp_path_factory.mktemp("whole") / "out"
    finish(start(command, out))
    return result(out)


def test_kill_while_pruning(command: list[str], whole: dict[str, dict[str, str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(command, out)
    kill_when(process, (out / ".work" / "003.json").exists)
    assert not (out / "checkpoint").exists()
    assert not (out / ".work" / f"{BLOCKS - 1:03d}.json").exists()
    log = finish(start(command, out, "--resume"))
    assert "going on after block" in log
    assert result(out) == whole
    assert not (out / ".work").exists()


def test_kill_while_exporting(command: list[str], whole: dict[str, dict[str, str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(command, out)
    kill_when(process, lambda: any((out / ".onnx.partial").glob("*")))
    assert not (out / "onnx").exists()
    finish(start(command, out, "--resume"))
    assert result(out) == whole
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []


@pytest.mark.slow
@pytest.mark.long
def test_kill_while_training(command: list[str], tmp_path: Path) -> None:
    training = ("--recover", "distill", "--recover-budget", "12 steps", "--recover-text", command[6],
                "--recover-length", "64", "--recover-learning-rate", "0.002")  # fmt: skip
    finish(start(command, tmp_path / "whole", *training))
    out = tmp_path / "out"
    process = start(command, out, *training)
    state = out / ".work" / "recovery" / "state.json"
    kill_when(process, lambda: state.is_file() and '"moments"' in state.read_text())
    assert not (out / "recovered").exists()
    log = finish(start(command, out, *training, "--resume"))
    (step,) = re.findall(r"going on after step (\d+)", log)
    assert int(step) > 0
    names = ("checkpoint", "recovered", "onnx")
    files, expected = ({name: sha256_tree(place / name) for name in names} for place in (out, tmp_path / "whole"))
    for name in names:
        assert {f: h for f, h in files[name].items() if f != "README.md"} == {
            f: h for f, h in expected[name].items() if f != "README.md"
        }
    assert not (out / ".work").exists()


@pytest.mark.slow
@pytest.mark.long
def test_twenty_kills_at_random_moments(command: list[str], whole: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """Each followed by --resume; a run that comes to its end makes place for another one."""
    rng, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        out = tmp_path / f"out{runs}"
        while kills < 20:
            process = start(command, out, *(["--resume"] if out.exists() else []))
            try:
                process.wait(rng.uniform(1, 12))  # it takes about so long from start to end
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
            finish_or_killed(process)
            if process.returncode == 0:
                break
        else:
            finish(start(command, out, "--resume"))
        assert result(out) == whole
        assert (out / "report" / "report.json").is_file()
        assert not [p for p in out.iterdir() if p.name.startswith(".")]
        runs += 1


def finish_or_killed(process: subprocess.Popen[bytes]) -> None:
    _, err = process.communicate(timeout=600)
    assert process.returncode in (0, -signal.SIGKILL), err.decode()
