"""`--verify light`: what can be said of a model that does not fit into memory, and what is left unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_text

import slimexport
from slimexport.artifacts import read_json
from slimexport.checkpoint import save
from slimexport.config import RunConfig
from slimexport.errors import BadInputError, NotReproducedError
from slimexport.loading import load_model
from slimexport.machine import memory
from slimexport.runtime import open_decoder
from slimexport.streaming.model import mapped_in_float32
from slimexport.testing.models import tiny_config, tiny_model, tiny_tokenizer
from slimexport.verification.perplexity import accuracy
from slimexport.verification.streamed import streamed_accuracy


def saved(place: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    tiny_model(tiny_config(family)).to(dtype).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def options(model: Path, **more: Any) -> RunConfig:
    place = model.parent
    text, other = tiny_text(place / "text.txt", 3000, seed=1), tiny_text(place / "eval.txt", 2000, seed=5)
    given = {"calibration_tokens": 512, "sequence_length": 64, "eval_tokens": 250, "eval_window": 64, "fast": True,
             "latency_runs": 0, "ratio": 0.3, "round_to": 8}  # fmt: skip
    return RunConfig(model=str(model), calibration=str(text), eval_text=str(other), **{**given, **more})


def figures(report: Any) -> dict[str, Any]:
    return {figure.name: figure for figure in report.verification.figures}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_light_run_says_of_accuracy_what_a_full_one_says(tmp_path: Path, dtype: torch.dtype) -> None:
    model = saved(tmp_path / "model", dtype=dtype)
    full = slimexport.run(options(model), tmp_path / "full")
    light = slimexport.run(
        options(model, verify="light", max_kl=100.0, latency_runs=3, prompt_lengths=(9999,)), tmp_path / "light"
    )
    assert light.passed
    for name in ("accuracy.perplexity", "accuracy.kl", "accuracy.top1_agreement"):
        ours, theirs = figures(light)[name], figures(full)[name]
        assert ours.shrunk == pytest.approx(theirs.shrunk, rel=1e-4)
        assert ours.ratio is None or ours.ratio == pytest.approx(theirs.ratio, rel=1e-4)
    numerics = read_json(tmp_path / "light" / "numerics.json")["onnx"]
    assert numerics["prompts"] == 1
    assert set(numerics["steps"]) == {"prefill", "decode", "chunk"}
    assert numerics["greedy_tokens"] == 0
    assert any("Not checked: greedy tokens" in note for note in light.verification.notes)
    assert not (tmp_path / "light" / "baseline").exists()
    assert not list((tmp_path / "light").glob(".*.partial"))
    graphs = [(tmp_path / name / "onnx" / "model.onnx.data").read_bytes() for name in ("full", "light")]
    assert graphs[0] == graphs[1]


def test_a_gate_on_what_was_not_measured_does_not_pass(tmp_path: Path) -> None:
    made = slimexport.run(options(saved(tmp_path / "model"), verify="light", min_speedup=0.1), tmp_path / "out")
    assert not made.passed


@pytest.mark.parametrize("more", [{"tasks": ("arc_easy",)}, {"precision": ("int8",)}], ids=str)
def test_what_light_verification_cannot_see_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need verify full"):
        RunConfig(model="m", verify="light", **more)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen2", "falcon"])
def test_block_by_block_is_the_perplexity_of_the_whole(tmp_path: Path, family: str) -> None:
    """Windows of which the last is shorter; final norms, soft caps and tied heads are the family's."""
    model, other = saved(tmp_path / "model", family), tmp_path / "other"
    torch.manual_seed(1)
    tiny_model(tiny_config(family)).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    ids = np.random.default_rng(0).integers(3, 100, 3 * 32 + 9)
    config = RunConfig(model=str(model), eval_window=32)
    pair = [load_model(config.model_copy(update={"model": str(m)}), streamed=True) for m in (model, other)]
    found = streamed_accuracy(*pair, ids, config)
    expected = accuracy(open_decoder(model, threads=1), open_decoder(other, threads=1), ids, 32)
    np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-5)
    for name in ("baseline_nll", "kl"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4)
    assert (found.agreements == expected.agreements).all()
    alone = streamed_accuracy(pair[0], None, ids, config)
    assert alone.kl is None
    np.testing.assert_allclose(alone.nll, expected.nll, rtol=1e-5)


def test_a_model_that_changed_is_no_dense_model(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    slimexport.run(options(model, verify="light"), tmp_path / "out")
    data = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**data, "temperature": 0.5}))
    with pytest.raises(BadInputError, match="has changed since it was pruned"):
        slimexport.verify(tmp_path / "out", {"eval_tokens": 200})


def test_weights_in_a_file_are_the_same_weights(tmp_path: Path) -> None:
    place = saved(tmp_path / "model", dtype=torch.bfloat16)
    whole, mapped = (load_model(RunConfig(model=str(place))).model for _ in range(2))
    mapped = mapped_in_float32(mapped, tmp_path / "float32")
    for (name, one), (_, other) in zip(whole.float().named_parameters(), mapped.named_parameters(), strict=True):
        assert other.dtype == torch.float32, name
        assert torch.equal(one, other), name
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, mapped(ids).logits)


def test_a_fresh_process_with_too_little_memory_reads_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 0)
    notes: list[str] = []

    class Log(slimexport.Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    slimexport.prune(options(saved(tmp_path / "model")), tmp_path / "out", progress=Log(quiet=True))
    assert any("reads the checkpoint block by block" in note for note in notes)
    assert read_json(tmp_path / "out" / "prune.json")["checkpoint"]["max_logit_difference"] == 0.0


def test_a_wrong_block_is_noticed_block_by_block_as_well(tmp_path: Path) -> None:
    place = saved(tmp_path / "model")
    loaded = load_model(RunConfig(model=str(place)))
    assert save.check_round_trip(loaded.model, place, 0, whole=False) == 0.0
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.down_proj.weight += 0.01  # type: ignore[union-attr,operator,index]
    with pytest.raises(NotReproducedError, match="differs from the model in memory"):
        save.check_round_trip(loaded.model, place, 0, whole=False)
