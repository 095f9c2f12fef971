"""Two processes with a part of the calibration set each give what one gives."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_directory, tiny_text
from safetensors.torch import load_file

from slimexport import pipeline
from slimexport.artifacts import read_json, sha256_file
from slimexport.config import RunConfig

# Sums over two parts differ in the last bit of float64; what is stored are float32 weights of about 0.1.
TOLERANCE = 1e-6
LONG = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("model") / "model", "qwen3", num_hidden_layers=4)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = tiny_text(tmp_path_factory.mktemp("text") / "text.txt", 14_000, seed=0)
    # 256 sequences of 48 tokens: four batches, the last one shorter.
    options = {"calibration": text, "calibration-tokens": 12_288, "sequence-length": 48, "ratio": 0.35,
               "probe-tokens": 128, "curvature-tokens": 128, "group-size-start": 4}  # fmt: skip
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def started(
    model: Path, words: list[str], out: Path, size: int, *more: str, of_last: tuple[str, ...] = ()
) -> list[Any]:
    """`of_last`: words that the last rank is given besides."""
    return ranks("prune", str(model), *words, *more, "-o", str(out), size=size, of_last=of_last)


def ranks(*line: str, size: int, of_last: tuple[str, ...] = ()) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "slimexport", *line, *(of_last if rank == size - 1 else ())],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=known | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)},
        ) for rank in range(size)
    ]  # fmt: skip


def ended(processes: list[Any]) -> list[tuple[int, str]]:
    found = []
    for process in processes:
        _, err = process.communicate(timeout=300)
        found.append((process.returncode, err))
    return found


def kept(out: Path) -> list[Any]:
    return [(t["query_heads"], t["channels"]) for t in read_json(out / "prune.json")["trace"]]


@pytest.mark.parametrize(
    "more",
    [
        ("--fast",),
        pytest.param(("--refit", "0.1", "--allocation", "incremental"), marks=LONG),
        (),  # candidates are dealt out
        pytest.param(("--allocation", "search", "--search-evaluations", "6"), marks=LONG),  # and plans
    ],
)
def test_two_ranks_choose_what_one_chooses(
    model: Path, words: list[str], tmp_path: Path, more: tuple[str, ...]
) -> None:
    for size in (1, 2):
        for code, err in ended(started(model, words, tmp_path / f"of{size}", size, *more)):
            assert code == 0, err
    one, two = (tmp_path / f"of{size}" for size in (1, 2))
    assert read_json(one / "plan.json") == read_json(two / "plan.json")
    assert kept(one) == kept(two)
    if (one / "costs.json").is_file():
        ours, theirs = (read_json(out / "costs.json") for out in (one, two))
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    weights, others = (load_file(out / "checkpoint" / "model.safetensors") for out in (one, two))
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=0, atol=TOLERANCE, msg=name)
    for a, b in zip(read_json(one / "prune.json")["trace"], read_json(two / "prune.json")["trace"], strict=True):
        assert a["ffn_error"] == pytest.approx(b["ffn_error"], rel=1e-4)
        assert a["attention_error"] == pytest.approx(b["attention_error"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.long
def test_the_last_rank_may_have_less(model: Path, words: list[str], tmp_path: Path) -> None:
    """Three ranks and four batches."""
    for size in (1, 3):
        for code, err in ended(started(model, words, tmp_path / f"of{size}", size, "--fast")):
            assert code == 0, err
    assert kept(tmp_path / "of1") == kept(tmp_path / "of3")


def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on(model: Path, words: list[str], tmp_path: Path) -> None:
    """With fewer ranks as well, from the blocks that are finished."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert [code for code, _ in ended(started(model, words, whole, 1, "--fast"))] == [0]
    processes = started(model, words, out, 2, "--fast")
    until(lambda: (out / ".work" / "001.json").exists(), processes)
    processes[1].send_signal(signal.SIGKILL)
    (code, err), _ = ended(processes)
    assert code != 0
    assert "Another rank is gone" in err
    assert "Traceback" not in err
    for code, err in ended(started(model, words, out, 3, "--fast", "--resume")):
        assert code == 0, err
    assert kept(out) == kept(whole)
    assert not (out / ".work").exists()
    # And once it is done there is nothing to do for anyone.
    assert [code for code, _ in ended(started(model, words, out, 2, "--fast", "--resume"))] == [0, 0]


TRAINING = ("--recover-budget", "6 steps", "--recover-sequences", "3", "--recover-length", "48",
            "--recover-learning-rate", "0.002")  # fmt: skip


@pytest.fixture(scope="module")
def pruned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is pruned and not yet trained; to be copied."""
    place = tmp_path_factory.mktemp("pruned")
    text, other = tiny_text(place / "text.txt", 6000, seed=1), tiny_text(place / "eval.txt", 2000, seed=5)
    config = RunConfig(model=str(model), calibration=str(text), recover_text=str(text), eval_text=str(other),
                       ratio=0.35, calibration_tokens=960, sequence_length=48, fast=True)  # fmt: skip
    pipeline.prune(config, place / "run")
    return place / "run"


@pytest.mark.parametrize("method", ["distill", "lora"])
def test_two_ranks_train_as_one_does(pruned: Path, tmp_path: Path, method: str) -> None:
    """Three windows a step, so that one of two ranks has more of them; of one domain there is one to judge by, so that
    the other has none."""
    short = tiny_text(tmp_path / "short.txt", 140, seed=1)  # the beginning of the other
    mixed = f"mix:{pruned.parent / 'text.txt'}=0.8,{short}=0.2"
    for size in (1, 2):
        shutil.copytree(pruned, tmp_path / f"of{size}")
        line = ["recover", str(tmp_path / f"of{size}"), "--recover", method, "--recover-text", mixed, *TRAINING]
        for code, err in ended(ranks(*line, size=size)):
            assert code == 0, err
    one, two = (read_json(tmp_path / f"of{size}" / "recover.json") for size in (1, 2))
    assert one["steps"] == two["steps"] == 6
    assert one["best"] == two["best"] > 0
    first, then = one["points"][:2], two["points"][:2]
    assert [p["judged"] for p in first[:1]] == pytest.approx([p["judged"] for p in then[:1]], rel=1e-6)
    assert first[1]["loss"] == pytest.approx(then[1]["loss"], rel=1e-5)  # of the same windows
    # After that they differ: forward passes may be in bfloat16, and hold other windows together.
    gained = first[0]["judged"] - one["points"][one["best"]]["judged"]
    for a, b in zip(one["points"], two["points"], strict=True):
        assert a["judged"] == pytest.approx(b["judged"], abs=0.1 * gained)
    weights, others = (load_file(tmp_path / f"of{size}" / "recovered" / "model.safetensors") for size in (1, 2))
    before = load_file(pruned / "checkpoint" / "model.safetensors")
    moved = sum(float((tensor - before[name]).square().sum()) for name, tensor in weights.items())
    apart = sum(float((tensor - others[name]).square().sum()) for name, tensor in weights.items())
    assert apart < 0.05 * moved
    assert moved > 0


def test_two_ranks_train_blocks_one_by_one(pruned: Path, tmp_path: Path) -> None:
    out = shutil.copytree(pruned, tmp_path / "out")
    options = ("--recover-budget", "30 steps", "--recover-sequences", "2", "--recover-length", "48")
    for code, err in ended(ranks("recover", str(out), "--recover", "local", *options, size=2)):
        assert code == 0, err
    made = read_json(out / "recover.json")
    assert made["best"] > 0
    assert made["tokens"] == made["steps"] * 2 * 48  # a step's sequences are divided, not multiplied


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_go_on_with_a_training_to_the_same_bytes(pruned: Path, tmp_path: Path) -> None:
    whole, part = (shutil.copytree(pruned, tmp_path / name) for name in ("whole", "part"))
    line = ("--recover", "distill", *TRAINING, "--recover-budget", "24 steps")
    for code, err in ended(ranks("recover", str(whole), *line, size=2)):
        assert code == 0, err
    state = part / ".work" / "recovery" / "state.json"
    processes = ranks("recover", str(part), *line, size=2)
    until(lambda: state.is_file() and '"moments"' in state.read_text(), processes)
    for process in processes:
        process.kill()
    ended(processes)
    assert not (part / "recovered").exists()
    (code, err), (other_code, other_err) = ended(ranks("recover", str(part), *line, "--resume", size=2))
    assert (code, other_code) == (0, 0), err + other_err
    (step,) = re.findall(r"going on after step (\d+)", err)
    assert int(step) > 0
    assert read_json(part / "recover.json")["points"][-1]["step"] == 24
    of_whole, of_part = (sha256_file(out / "recovered" / "model.safetensors") for out in (whole, part))
    assert of_whole == of_part


def until(ready: Callable[[], bool], processes: list[Any]) -> None:
    deadline = time.monotonic() + 200
    while not ready():
        assert all(process.poll() is None for process in processes), "ended too soon"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_ranks_with_other_data_or_too_many_of_them(model: Path, words: list[str], tmp_path: Path) -> None:
    other = tiny_text(tmp_path / "other.txt", 14_000, seed=5)
    unlike = started(model, words, tmp_path / "out", 2, "--fast", of_last=("--calibration", str(other)))
    (code, err), (other_code, other_err) = ended(unlike)
    assert (code, other_code) == (4, 4)
    assert "Rank 1 has text" in other_err
    assert "1 of 2 ranks have something else than rank 0" in err

    few = [*words, "--calibration-tokens", "48"]
    found = ended(started(model, few, tmp_path / "few", 2, "--fast"))
    assert found[0][0] == 4
    assert "1 calibration sequences are too few for 2 ranks" in found[0][1]


def test_other_commands_are_one_process(model: Path) -> None:
    line = [sys.executable, "-m", "slimexport", "plan", str(model)]
    done = subprocess.run(line, env=os.environ | {"WORLD_SIZE": "2"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "start it without torchrun" in done.stderr
