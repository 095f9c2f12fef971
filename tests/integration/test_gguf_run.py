"""`slimexport run --target gguf`: pruned, written, measured in llama.cpp beside the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_fixture import bpe, tiny
from models import tiny_directory, tiny_text

import slimexport
from slimexport import pipeline
from slimexport.artifacts import read_json
from slimexport.bench import Settings
from slimexport.bench.subjects import open_all
from slimexport.errors import BadInputError
from slimexport.verification.perplexity import torch_perplexity

pytest.importorskip("xllamacpp")


def config_for(place: Path, model: Path, **changes: Any) -> slimexport.RunConfig:
    texts = [tiny_text(place / f"{name}.txt", 9000, seed) for seed, name in enumerate(("calibration", "eval"))]
    values: dict[str, Any] = {
        "model": str(model), "calibration": str(texts[0]), "eval_text": str(texts[1]), "calibration_tokens": 2048,
        "sequence_length": 64, "eval_tokens": 512, "eval_window": 64, "latency_runs": 2, "ratio": 0.3, "fast": True,
        "round_to": 32, "target": ("gguf",), "prompt_lengths": (8,), "decode_tokens": 4, "max_perplexity_ratio": 1e6,
        "threads": 1,
    }  # fmt: skip
    return slimexport.RunConfig(**(values | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    place = tmp_path_factory.mktemp("run")
    model = tiny("llama", intermediate_size=128)
    model.save_pretrained(place / "model")
    bpe().save_pretrained(place / "model")
    config = config_for(place, place / "model", precision=("fp32", "int8"))
    return place / "out", pipeline.run(config, place / "out")


def test_it_is_measured_like_a_graph(finished: tuple[Path, Any]) -> None:
    out, report = finished
    assert report.passed
    assert tuple(report.exports) == ("gguf", "gguf-int8", "baseline/gguf", "baseline/gguf-int8")
    own, small = report.verification, report.others["gguf-int8"]
    model, tokenizer = slimexport.load(out)
    ids = tokenizer((out.parent / "eval.txt").read_text())["input_ids"][:512]
    assert own.figure("accuracy.perplexity").shrunk == pytest.approx(
        torch_perplexity(model, np.array(ids), window=64), rel=1e-5
    )
    assert small.figure("accuracy.perplexity").shrunk == pytest.approx(
        own.figure("accuracy.perplexity").shrunk, rel=0.2
    )
    size = own.figure("size.export_mb")
    assert size.shrunk == pytest.approx((out / "gguf" / "model.gguf").stat().st_size / 1e6)
    assert own.figure("load.seconds").shrunk > 0
    assert own.figure("prefill.ttft_ms.8") is not None
    assert small.figure("memory.kv_bytes_per_token").shrunk == own.figure("memory.kv_bytes_per_token").shrunk / 2
    numerics = read_json(out / "numerics.json")
    for name in ("gguf", "gguf-int8"):
        assert numerics[name]["greedy_equal"] + len(numerics[name]["ties"]) == numerics[name]["greedy_tokens"]
    assert len(numerics["gguf-int8"]["before"]) == 1


def test_blocks_differ_and_bench_decodes_them(finished: tuple[Path, Any]) -> None:
    out, _ = finished
    channels = {block["channels"] for block in read_json(out / "plan.json")["blocks"]}
    assert len(channels) > 1
    subjects = open_all([out, out / "checkpoint"], Settings(prompts=(4,), pasts=(8,), tokens=4, threads=1))
    assert list(subjects) == ["out/gguf", "out/gguf-int8", "baseline/gguf", "baseline/gguf-int8", "out/checkpoint"]
    file, model = subjects["out/gguf"], subjects["out/checkpoint"]
    prompt = np.arange(5, 14)
    one, other = file.timed_greedy(prompt, 6), model.timed_greedy(prompt, 6)
    assert one.tokens == other.tokens
    assert len(one.token_seconds) == 6
    assert (file.kind, file.precision, file.vocabulary) == ("gguf", "fp32", 320)
    assert file.timed_batch(np.stack([prompt, prompt[::-1]]), 2) > 0


def test_what_cannot_be_written_is_said_before_pruning(tmp_path: Path) -> None:
    words = tiny_directory(tmp_path / "words")
    with pytest.raises(BadInputError, match="is WordLevel: BPE of bytes"):
        pipeline.run(config_for(tmp_path, words), tmp_path / "out")
    qwen3 = tiny_directory(tmp_path / "qwen3", "qwen3")
    with pytest.raises(BadInputError, match="no qwen3 model whose blocks differ in size"):
        pipeline.run(config_for(tmp_path, qwen3), tmp_path / "out")
    assert not (tmp_path / "out" / "checkpoint").exists()
