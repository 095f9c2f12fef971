"""`verify` from end to end on two tiny graphs, and the process that measures load time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from onnx_fixture import HEAD_DIM, VOCAB, export_tiny, tiny_llama

from slimexport.artifacts import Estimates, TextSource, VerificationReport, from_dict, to_dict
from slimexport.config import RunConfig
from slimexport.errors import BadInputError
from slimexport.runtime import OnnxDecoder
from slimexport.verification import footprint, verify
from slimexport.verification.numerics import check_export


@dataclass
class Text:
    input_ids: torch.Tensor
    source: TextSource


TEXT = Text(
    torch.from_numpy(np.random.default_rng(5).integers(0, VOCAB, 200)), TextSource("made up", 200, "abc", None, None)
)
CONFIG = RunConfig(
    model="tiny", eval_window=32, prompt_lengths=(8, 16), decode_tokens=4, latency_runs=3, threads=1, seed=1
)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    models = tiny_llama(channels=48, kv_heads=1), tiny_llama()
    made = [export_tiny(model, root / name) for model, name in zip(models, ("shrunk", "dense"), strict=True)]
    numerics = [
        check_export(OnnxDecoder(root / name, threads=1), model, seed=1, steps=8)
        for model, name in zip(models, ("shrunk", "dense"), strict=True)
    ]
    return (*made, *numerics)


def test_everything(artifacts):
    shrunk, dense, own, other = artifacts
    estimates = Estimates(100, 80, 400, 300, 200, 4), Estimates(200, 160, 800, 600, 500, 8)
    seen = []
    report = verify(
        shrunk, dense, TEXT, CONFIG, *estimates, own, other, lambda done, total, text: seen.append((done, total, text))
    )
    names = [f.name for f in report.figures]
    assert names == [
        "accuracy.perplexity",
        "accuracy.nll",
        "accuracy.kl",
        "accuracy.top1_agreement",
        "prefill.ttft_ms.8",
        "prefill.ttft_ms.16",
        "decode.tpot_ms",
        "decode.itl_ms.p50",
        "decode.itl_ms.p90",
        "decode.itl_ms.p99",
        "decode.tokens_per_s",
        "size.export_mb",
        "load.seconds",
        "memory.peak_rss_mb",
        "memory.kv_bytes_per_token",
        "numerics.max_logit_difference",
        "numerics.mean_logit_difference",
        "numerics.greedy_agreement",
    ]
    kv = report.figure("memory.kv_bytes_per_token")
    assert (kv.shrunk, kv.baseline, kv.ratio) == (3 * 2 * HEAD_DIM * 4, 3 * 4 * HEAD_DIM * 4, 0.5)
    size = report.figure("size.export_mb")
    assert size.shrunk < size.baseline
    assert report.figure("accuracy.kl").shrunk > 0
    assert report.figure("numerics.greedy_agreement").shrunk == 1
    assert report.figure("memory.peak_rss_mb").shrunk > 10
    assert {text for _, _, text in seen} == {"loads", "tokens of evaluation text", "latency rounds"}
    # What is written can be read, with nothing that JSON does not know.
    data = json.loads(json.dumps(to_dict(report), allow_nan=False))
    assert from_dict(VerificationReport, data, "report") == report


def test_without_baseline_and_latency(artifacts):
    shrunk, _, own, _ = artifacts
    config = CONFIG.model_copy(update={"latency_runs": 0})
    report = verify(shrunk, None, TEXT, config, None, None, own, None)
    assert report.figure("decode.tpot_ms") is None
    assert report.figure("memory.peak_rss_mb") is None
    assert report.latency == {}
    assert report.figure("size.export_mb").shrunk > 0
    assert all(f.ratio is None and f.baseline is None for f in report.figures)
    assert "latency_runs is 0" in report.notes[0]


def test_the_same_seed_gives_the_same_accuracy(artifacts):
    shrunk, dense, own, other = artifacts
    config = CONFIG.model_copy(update={"latency_runs": 0})
    first, second = (verify(shrunk, dense, TEXT, config, None, None, own, other) for _ in range(2))
    assert first == second


def test_a_window_longer_than_the_positions_is_refused(artifacts):
    shrunk, _, own, _ = artifacts
    config = CONFIG.model_copy(update={"latency_runs": 0, "eval_window": 512})
    with pytest.raises(BadInputError, match="eval_window 512"):
        verify(shrunk, None, TEXT, config, None, None, own, None)


def test_measuring_process(artifacts):
    """Holds no torch, and does not inherit the memory of the process that starts it."""
    ballast = np.ones(100_000_000)  # 800 MB here
    said = footprint._run(footprint.Path(artifacts[0].path), "cpu", 1)
    del ballast
    assert not said["torch_loaded"]
    assert said["rss_before_mb"] < said["peak_rss_mb"] < 500
    assert said["load_seconds"] > 0
    assert said["busy"] is None or "busy" in said["busy"] or "quota" in said["busy"]


def test_loading_beside_other_work_is_no_time(artifacts, monkeypatch):
    said = iter([None, None, "the machine was busy", None, None, None])
    run = lambda *_: {"load_seconds": 1.0, "peak_rss_mb": 100.0, "busy": next(said)}  # noqa: E731
    monkeypatch.setattr(footprint, "_run", run)
    place = footprint.Path(artifacts[0].path)
    load, memory = footprint.process_figures(place, place, "cpu", 1)[0]
    assert (load.valid, load.note) == (False, "the machine was busy")
    assert (memory.valid, memory.ratio) == (True, 1.0)


def test_a_measuring_process_that_fails_makes_the_figures_invalid(artifacts, tmp_path):
    figures, details = footprint.process_figures(tmp_path, None, "cpu", 1)
    assert [f.name for f in figures] == ["load.seconds", "memory.peak_rss_mb"]
    assert all(not f.valid and "holds neither model.onnx, model.gguf nor a checkpoint" in f.note for f in figures)
    assert len(details["shrunk"]) == footprint.LOADS


def test_memory_of_the_device_is_this_process_s(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{os.getpid()}, 512'\necho '1, 4096'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert footprint.device_memory_mb() == pytest.approx(512 * 2**20 / 1e6)
    tool.write_text("#!/bin/sh\necho 'No devices were found'\n")
    assert footprint.device_memory_mb() is None
    runs = {"shrunk": [{"device_memory_mb": 300.0}] * 3, "baseline": [{"device_memory_mb": 400.0}] * 3}
    (figure,) = footprint._device_figures(runs)
    assert (figure.name, figure.shrunk, figure.baseline, figure.ratio) == ("memory.device_mb", 300, 400, 0.75)
    assert footprint._device_figures({"shrunk": [{"device_memory_mb": None}]}) == ()


def test_size_counts_graph_and_weights_only(tmp_path):
    for name, size in (("model.onnx", 10), ("model.onnx.data", 2_000_000), ("tokenizer.json", 5_000_000)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert footprint.export_bytes(tmp_path) == 2_000_010
    assert footprint.size_figure(tmp_path, None).shrunk == pytest.approx(2.00001)


def test_importing_the_package_is_cheap():
    code = "import sys, slimexport.verification; print({'torch', 'numpy', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_manifest_that_moved_is_found_by_its_path(artifacts, tmp_path):
    with pytest.raises(BadInputError, match=r"holds neither model\.onnx, model\.gguf nor a checkpoint"):
        verify(
            replace(artifacts[0], path=str(tmp_path)),
            None,
            TEXT,
            CONFIG.model_copy(update={"latency_runs": 0}),
            None,
            None,
            artifacts[2],
            None,
        )
