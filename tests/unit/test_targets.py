"""Targets without building a graph: options, the order of the builders, sizes read from weights, companion files."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from slimexport.artifacts import BlockSizes, ExportArtifact
from slimexport.errors import BadInputError, NotReproducedError
from slimexport.targets import onnx as onnx_target
from slimexport.targets import registry
from slimexport.targets.base import BuilderUnsupportedError, BuiltGraph, ExportOptions, load_artifact
from slimexport.targets.builders.sizes import architecture, plain_config
from slimexport.targets.files import write_config, write_tokenizer
from slimexport.targets.genai_config import genai_config

GRAPH = BuiltGraph(
    model=None,  # type: ignore[arg-type]  # made by the builders below
    inputs=("input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"),
    outputs=("logits", "present.0.key", "present.0.value"),
    kv_heads=(2, 1),
    query_heads=4,
    head_dim=16,
    left_padding=False,
    shared_kv=True,
)


def model(**settings: Any) -> LlamaForCausalLM:
    values: dict[str, Any] = {
        "vocab_size": 31,
        "hidden_size": 40,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**values | settings)).eval()


class Tokenizer:
    bos_token_id, eos_token_id, pad_token_id = 5, 6, 7

    def save_pretrained(self, directory: str) -> None:
        config = {
            "tokenizer_class": "TokenizersBackend",
            "is_local": True,
            "name_or_path": "/home/me",
            "eos_token": "x",
        }
        (Path(directory) / "tokenizer_config.json").write_text(json.dumps(config))


class Builder:
    """Gives a graph that has its name, or raises."""

    def __init__(self, name: str, error: Exception | None = None):
        self.name, self.error, self.calls = name, error, 0

    def build(self, model: Any, options: ExportOptions) -> BuiltGraph:
        self.calls += 1
        if self.error:
            raise self.error
        logits = onnx_ir.val("logits", onnx_ir.DataType.FLOAT, ["batch", "tokens", 31])
        graph = onnx_ir.Graph([logits], [logits], nodes=[], opset_imports={"": 24}, name=self.name)
        return dataclasses.replace(GRAPH, model=onnx_ir.Model(graph, ir_version=10))


def export(
    builders: tuple[Builder, ...], directory: Path, monkeypatch: pytest.MonkeyPatch, check: Any = None, **options: str
) -> ExportArtifact:
    monkeypatch.setattr(onnx_target, "_BUILDERS", builders)
    tokenizer: Any = Tokenizer()
    return registry.get("onnx").export(model(), tokenizer, directory, ExportOptions(**options), check)


# ------------------------------------------------------------------------------------------------ options, registry


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"builder": "optimum"}, "exporter must be one of auto, mobius, transformers"),
        ({"precision": "int2"}, "precision must be one of"),
        ({"provider": "tpu"}, "provider must be one of"),
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, str], words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        ExportOptions(**options)


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("onnx", {"precision": "bf16"}, "bf16 on the CPU"),
        ("genai", {"precision": "bf16"}, "bf16 on the CPU"),
        ("safetensors", {"precision": "int8"}, "holds fp32, fp16, bf16, not int8"),
        ("safetensors", {"provider": "openvino"}, "on cpu or cuda, not on openvino"),
        ("gguf", {"provider": "cuda"}, "on the CPU here, not on cuda"),
    ],
    ids=str,
)
def test_targets_refuse_what_they_cannot_do(target: str, options: dict[str, str], words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        registry.get(target).check_options(ExportOptions(**options))
    registry.get("safetensors").check_options(ExportOptions(precision="bf16"))


def test_registry_knows_the_target_and_suggests_it() -> None:
    assert "onnx" in registry.names()
    with pytest.raises(BadInputError, match="Did you mean 'onnx'"):
        registry.get("onxx")


def test_names_of_targets_come_without_heavy_imports() -> None:
    code = (
        "import sys; from slimexport.targets import registry; registry.names();"
        "print([m for m in ('torch', 'transformers', 'onnx', 'mobius', 'onnxruntime') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# --------------------------------------------------------------------------------------------- order of the builders


def test_auto_takes_the_first_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Builder("mobius"), Builder("transformers")
    artifact = export((first, second), tmp_path, monkeypatch)
    assert (artifact.builder, artifact.passes, second.calls) == ("mobius", (), 0)


def test_auto_goes_on_when_a_builder_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builders = Builder("mobius", BuilderUnsupportedError("no rope")), Builder("transformers")
    artifact = export(builders, tmp_path, monkeypatch)
    assert artifact.builder == "transformers"
    assert artifact.notes[0] == "The mobius builder was not used: no rope"
    assert load_artifact(tmp_path) == artifact


@pytest.mark.parametrize("error", [NotReproducedError("off by 3"), BadInputError("cannot open")], ids=str)
def test_auto_goes_on_when_the_check_fails(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(artifact: ExportArtifact) -> None:
        assert (Path(artifact.path) / "export.json").exists()
        if artifact.builder == "mobius":
            (Path(artifact.path) / "left behind").write_text("by the first builder")
            raise error

    artifact = export((Builder("mobius"), Builder("transformers")), tmp_path, monkeypatch, check)
    assert artifact.notes[0] == f"The mobius builder's graph was dropped: {error}"
    assert "left behind" not in artifact.files
    assert not (tmp_path / "left behind").exists(), "it must not be shipped"
    assert onnx_ir.load(tmp_path / "model.onnx").graph.name == "transformers"


def test_a_graph_that_fails_the_check_never_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(artifact: ExportArtifact) -> None:
        raise NotReproducedError(f"{artifact.builder} is off")

    second = Builder("transformers")
    with pytest.raises(NotReproducedError, match="mobius is off"):
        export((Builder("mobius"), second), tmp_path, monkeypatch, check, builder="mobius")
    assert second.calls == 0
    with pytest.raises(NotReproducedError, match="transformers is off"):
        export((Builder("mobius"), second), tmp_path, monkeypatch, check)


def test_all_reasons_are_told_when_nothing_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builders = (
        Builder("mobius", BuilderUnsupportedError("no rope")),
        Builder("transformers", BuilderUnsupportedError("no trace")),
    )
    with pytest.raises(
        BadInputError, match=r"transformers builder cannot.*no trace.*mobius builder was not used: no rope"
    ):
        export(builders, tmp_path, monkeypatch)


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_target.importlib.util, "find_spec", lambda name: None if name == "mobius" else object())
    with pytest.raises(BadInputError, match=r"'mobius': pip install 'slimexport\[cpu\]'"):
        export((Builder("mobius"),), tmp_path, monkeypatch)


# -------------------------------------------------------------------------------------------- sizes from the weights


def test_sizes_come_from_the_weights() -> None:
    made = model()
    mlp = made.model.layers[1].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = torch.nn.Parameter(linear.weight.data[:9])
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight.data[:, :9])
    assert architecture(made).blocks == (BlockSizes(2, 2, 24), BlockSizes(2, 2, 9))


@pytest.mark.parametrize(
    ("name", "rows"),
    [("self_attn.q_proj", 48), ("self_attn.v_proj", 16), ("self_attn.k_proj", 24), ("mlp.up_proj", 8)],
)
def test_weights_that_do_not_fit_together(name: str, rows: int) -> None:
    made = model()
    linear = made.model.layers[1].get_submodule(name)
    linear.weight = torch.nn.Parameter(linear.weight.data[:rows])
    with pytest.raises(BuilderUnsupportedError, match="block 1 do not fit together"):
        architecture(made)


def test_unequal_query_heads_per_group_are_refused() -> None:
    made = model()
    attention = made.model.layers[0].self_attn
    attention.q_proj.weight = torch.nn.Parameter(attention.q_proj.weight.data[:48])
    attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight.data[:, :48])
    with pytest.raises(BuilderUnsupportedError, match="block 0"):
        architecture(made)


def test_other_families_are_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    other = BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(BuilderUnsupportedError, match="family 'bloom'"):
        architecture(other)


def test_head_dim_without_an_explicit_one() -> None:
    assert architecture(model(head_dim=None)).head_dim == 10


def test_plain_config_of_a_heterogeneous_one() -> None:
    made = model()
    made.config.per_layer_config = {1: {"num_attention_heads": 2, "intermediate_size": 8}}
    plain = plain_config(made)
    assert not plain.is_heterogeneous
    assert (plain.num_attention_heads, plain.head_dim, plain.hidden_size) == (1, 16, 40)


# --------------------------------------------------------------------------------------------------- companion files


def test_genai_config() -> None:
    made = model()
    made.generation_config = GenerationConfig(eos_token_id=[9, 8], do_sample=True, temperature=0.6, top_k=20)
    tokenizer: Any = Tokenizer()
    found = genai_config(made, tokenizer, GRAPH, ExportOptions(provider="cuda"))
    assert found["model"]["type"] == "llama"
    assert (found["model"]["context_length"], found["model"]["vocab_size"]) == (128, 31)
    decoder = found["model"]["decoder"]
    assert "position_ids" not in decoder["inputs"], "the graph has none"
    assert decoder["inputs"]["past_key_names"] == "past_key_values.%d.key"
    assert decoder["session_options"]["provider_options"] == [{"cuda": {}}]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["num_attention_heads"]) == (2, 2, 4)
    search = found["search"]
    assert (search["do_sample"], search["temperature"], search["top_k"], search["top_p"]) == (True, 0.6, 20, 1.0)
    assert search["past_present_share_buffer"] is True


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        ({"bos_token_id": 3, "eos_token_id": [9, 8], "pad_token_id": 4}, {}, (3, [9, 8], 4)),
        ({}, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, (1, 2, 0)),
        ({"eos_token_id": [9, 8]}, {}, (1, [9, 8], 7)),
        ({}, {"bos_token_id": None, "eos_token_id": None}, (5, 6, 7)),
    ],
    ids=str,
)
def test_special_tokens_generation_then_config_then_tokenizer(
    generation: dict[str, Any], config: dict[str, Any], wanted: tuple[Any, ...]
) -> None:
    made = model(**config)
    made.generation_config = GenerationConfig(**generation)
    tokenizer: Any = Tokenizer()
    found = genai_config(made, tokenizer, GRAPH, ExportOptions())["model"]
    assert tuple(found[f"{name}_token_id"] for name in ("bos", "eos", "pad")) == wanted


def test_padding_falls_back_to_the_first_end_token() -> None:
    made = model()
    made.generation_config = GenerationConfig(eos_token_id=[9, 8])
    tokenizer: Any = SimpleNamespace(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    assert genai_config(made, tokenizer, GRAPH, ExportOptions())["model"]["pad_token_id"] == 9


def test_config_says_nothing_of_where_the_model_came_from(tmp_path: Path) -> None:
    made = model(rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
    made.config._name_or_path = "/home/me/secret"
    made.config.auto_map = {"AutoModelForCausalLM": "modeling.X"}
    write_config(made, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in config
    assert config["rope_theta"] == 12345.0
    assert "secret" not in (tmp_path / "config.json").read_text()
    assert "eos_token_id" in json.loads((tmp_path / "generation_config.json").read_text())


def test_tokenizer_config_for_both_readers(tmp_path: Path) -> None:
    tokenizer: Any = Tokenizer()
    write_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "x"}


def test_manifest_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"export\.json does not exist"):
        load_artifact(tmp_path)


@pytest.mark.parametrize(
    "before", ["input.past_key_values.", "past_key_values.", "cache.", "output.past_key_values.", ""]
)
def test_names_of_the_cache_in_every_release_of_transformers(before: str) -> None:
    from slimexport.targets.builders.transformers import _contract_name

    plain = ("input_ids", "attention_mask", "position_ids")
    assert _contract_name(f"{before}layers.12.keys", plain, "past_key_values") == "past_key_values.12.key"
    assert _contract_name(f"{before}layers.0.values", plain, "present") == "present.0.value"
    assert _contract_name("input_ids", plain, "past_key_values") == "input_ids"
    assert _contract_name(f"{before}layers.keys", plain, "present") == f"{before}layers.keys"  # refused by who asked
