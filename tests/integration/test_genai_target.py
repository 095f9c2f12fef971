"""The genai target: onnxruntime-genai has loaded it, and what it says is what plain ONNX Runtime says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from export_fixture import tiny, tokenizer

from slimexport.errors import BadInputError, NotReproducedError
from slimexport.targets import registry
from slimexport.targets.base import ExportOptions
from slimexport.targets.genai import check_generation

pytest.importorskip("onnxruntime_genai")


def unchecked(artifact: Any, reference: Any = None) -> None:
    """The numbers are the onnx target's, which has tests of its own."""


def export(directory: Path, model: Any, **options: str) -> Any:
    directory.mkdir(exist_ok=True)
    return registry.get("genai").export(model, tokenizer(), directory, ExportOptions(**options), unchecked)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("genai") / "out"
    export(place, tiny("llama", "per_layer"))
    return place


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(place, tmp_path / "copy"))


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_every_precision_generates(precision: str, tmp_path: Path) -> None:
    artifact = export(tmp_path / "out", tiny("qwen3", "uniform"), precision=precision)
    assert (artifact.target, artifact.precision) == ("genai", precision)


def test_it_is_registered_and_named_like_the_others() -> None:
    assert {"onnx", "genai"} <= set(registry.names())


def test_another_chat_template_is_seen(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(NotReproducedError, match="chat template gives 'What is the capital"):
        check_generation(copy, tokenizer(), "cpu")


def test_another_tokenizer_is_seen(copy: Path) -> None:
    changed = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = changed["model"]["vocab"]
    vocabulary["O"], vocabulary["n"] = vocabulary["n"], vocabulary["O"]
    (copy / "tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(NotReproducedError, match="tokenizer makes"):
        check_generation(copy, tokenizer(), "cpu")


def test_a_config_that_does_not_fit_the_graph_is_seen(copy: Path) -> None:
    path = copy / "genai_config.json"
    path.write_text(path.read_text().replace("past_key_values.%d.key", "past.%d.key"))
    with pytest.raises(NotReproducedError, match=r"onnxruntime-genai cannot (load|run) it"):
        check_generation(copy, tokenizer(), "cpu")


def test_other_tokens_are_seen(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-genai on one graph, the plain loop on one of other weights."""
    from slimexport import runtime

    export(copy.parent / "other", tiny("llama", "uniform"))
    real = runtime.OnnxDecoder
    monkeypatch.setattr(runtime, "OnnxDecoder", lambda place, provider: real(copy.parent / "other", provider))
    with pytest.raises(NotReproducedError, match=r"generates \d+ at step \d+, ONNX Runtime \d+"):
        check_generation(copy, tokenizer(), "cpu")


def test_a_model_that_it_cannot_run_is_refused_before_and_at_export(tmp_path: Path) -> None:
    from slimexport import testing
    from slimexport.architectures import architecture_of

    model = testing.tiny_model(testing.tiny_config("deepseek_v2"))
    target, architecture = registry.get("genai"), architecture_of(model.config, "here")
    with pytest.raises(BadInputError, match=r"cannot run deepseek_v2 models.*`--target onnx` exports"):
        target.check_model(model.config, architecture, ExportOptions())
    with pytest.raises(BadInputError, match=r"onnxruntime-genai cannot run this model\. No genai_config\.json"):
        export(tmp_path / "out", model)
