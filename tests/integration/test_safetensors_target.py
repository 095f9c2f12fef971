"""The safetensors target: a checkpoint in the precision asked for, through the same verification as a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixture import tiny, tokenizer
from models import tiny_directory, tiny_text

import slimexport
from slimexport import pipeline
from slimexport.artifacts import read_json
from slimexport.errors import BadInputError, NotReproducedError
from slimexport.targets import registry
from slimexport.targets.base import ExportOptions, load_artifact


def export(directory: Path, model: Any, **options: str) -> Any:
    directory.mkdir(exist_ok=True)
    return registry.get("safetensors").export(
        model, tokenizer(), directory, ExportOptions(**options), lambda artifact, reference=None: None
    )


@pytest.mark.parametrize("layout", ["per_layer", "uniform"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_it_loads_with_the_numbers_it_was_given(
    layout: str, precision: str, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    model: Any = tiny() if layout == "uniform" else slimexport.load(finished[0])[0]
    assert model.config.is_heterogeneous == (layout == "per_layer")
    artifact = export(tmp_path / "out", model, precision=precision)
    loaded, _ = slimexport.load(tmp_path / "out")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert loaded.dtype == dtype
    assert model.dtype == torch.float32, "what was exported is as it was"
    kept = dict(model.named_parameters())
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, kept[name].to(dtype)), name
    assert load_artifact(tmp_path / "out").files == artifact.files
    assert "export.json" not in artifact.files


def test_files_that_say_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import slimexport.checkpoint as checkpoint

    real = checkpoint.write_model

    def broken(model: Any, *rest: Any) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
        real(model, *rest)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] -= 1

    monkeypatch.setattr(checkpoint, "write_model", broken)
    with pytest.raises(NotReproducedError, match="differs from the model in memory"):
        export(tmp_path / "out", tiny("llama", "uniform"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    place = tmp_path_factory.mktemp("run")
    texts = [tiny_text(place / f"{name}.txt", 9000, seed=seed) for seed, name in enumerate(("calibration", "eval"))]
    config = slimexport.RunConfig(
        model=str(tiny_directory(place / "model")), calibration=str(texts[0]), eval_text=str(texts[1]),
        calibration_tokens=2048, sequence_length=64, eval_tokens=512, eval_window=64, latency_runs=2, ratio=0.3,
        fast=True, round_to=8, target=("safetensors", "onnx"), prompt_lengths=(8,), decode_tokens=4,
        max_perplexity_ratio=100.0,
    )  # fmt: skip
    return place / "out", pipeline.run(config, place / "out")


def test_a_run_measures_it_beside_the_graph(finished: tuple[Path, Any]) -> None:
    out, report = finished
    assert report.passed
    assert tuple(report.exports) == ("safetensors", "onnx", "baseline/safetensors", "baseline/onnx")
    own, graph = report.verification, report.others["onnx"]
    for name in ("accuracy.perplexity", "accuracy.kl", "memory.kv_bytes_per_token"):
        one, other = own.figure(name), graph.figure(name)
        assert one.shrunk == pytest.approx(other.shrunk, rel=1e-4), name
    size = own.figure("size.export_mb")
    assert size.shrunk == pytest.approx((out / "safetensors" / "model.safetensors").stat().st_size / 1e6)
    assert 0.4 < size.ratio < 1
    assert own.figure("load.seconds").shrunk > 0
    assert own.figure("prefill.ttft_ms.8") is not None
    numerics = read_json(out / "numerics.json")
    assert numerics["safetensors"]["greedy_equal"] == numerics["safetensors"]["greedy_tokens"]


def test_precisions_that_it_does_not_have_are_said_first(finished: tuple[Path, Any]) -> None:
    with pytest.raises(BadInputError, match="holds fp32, fp16, bf16, not int8"):
        pipeline.export(finished[0], {"target": ("safetensors",), "precision": ("int8",)}, force=True)


def test_routers_keep_their_precision(tmp_path: Path) -> None:
    """What transformers keeps in float32: rounded biases that are nearly alike would choose other experts."""
    from slimexport.testing.models import tiny_config, tiny_model

    model = tiny_model(tiny_config("deepseek_v3"))
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert biases
    for bias in biases:
        bias.copy_(5 + 0.01 * torch.arange(len(bias)) / len(bias))
    export(tmp_path / "out", model, precision="bf16")
    loaded, _ = slimexport.load(tmp_path / "out")
    found = dict(loaded.named_buffers())
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(found[name], bias), name
    assert loaded.dtype == torch.bfloat16
