"""Checkpoints of both layouts: written, reloaded in a fresh process, by us, by stock transformers, by remote code."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

import slimexport
from slimexport.architectures import architecture_of
from slimexport.architectures.family import Kept
from slimexport.artifacts import BlockSizes
from slimexport.checkpoint.save import check_round_trip, save_checkpoint
from slimexport.errors import BadInputError, NotReproducedError
from slimexport.pruning.planner import make_plan
from slimexport.pruning.shrink import apply_sizes, shrink_block

DIFFERENT = (BlockSizes(3, 2, 64), BlockSizes(2, 1, 32), BlockSizes(1, 2, 80))
SAME = (BlockSizes(3, 1, 32),) * 3  # 3 heads divide 96, so that Llama's plain config can say it


def shrunk(family: str, blocks: tuple[BlockSizes, ...], **changes: Any) -> Any:
    """A tiny model cut to `blocks` by keeping the first of everything."""
    model = tiny_model(family, **changes)
    architecture = architecture_of(model.config, "tiny")
    for block, b, dense in zip(model.model.layers, blocks, architecture.blocks, strict=True):
        heads = tuple(g * 2 + h for g in range(b.kv_groups) for h in range(b.heads_per_group))
        shrink_block(block, architecture, Kept(tuple(range(b.kv_groups)), heads, tuple(range(b.channels)), dense))
    apply_sizes(model.config, architecture, blocks)
    return model


def saved(model: Any, path: Path) -> Path:
    path.mkdir()
    architecture = architecture_of(model.config, "tiny")
    plan = make_plan(architecture, ratio=0, criterion="slimgpt", allocation="incremental", layout="per_layer")
    save_checkpoint(model, tiny_tokenizer(), architecture, plan, path, card="# tiny\n")
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None] * 5, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("blocks", [DIFFERENT, SAME], ids=["per_layer", "uniform"])
def test_our_loader_gives_the_same_logits(family: str, blocks: tuple[BlockSizes, ...], tmp_path: Path) -> None:
    model = shrunk(family, blocks)
    model.generation_config.max_new_tokens = 17
    path = saved(model, tmp_path / "c")
    again, tokenizer = slimexport.load(path)
    assert torch.equal(logits(again), logits(model))
    assert architecture_of(again.config, "tiny").blocks == blocks
    assert again.generation_config.max_new_tokens == 17
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    if not family.startswith("qwen"):  # for these transformers insists on a byte-level BPE, which the tiny one is not
        assert tokenizer("w3 w5").input_ids == tiny_tokenizer()("w3 w5").input_ids
    assert not again.training
    prompt = torch.arange(3, 12)[None]
    cached = again.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
    plain = again.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("layout", ["per_layer", "uniform"])
def test_a_pruned_checkpoint_is_a_legal_input(layout: str, tmp_path: Path) -> None:
    from slimexport.artifacts import CalibrationSet, TextSource
    from slimexport.config import RunConfig
    from slimexport.loading import load_model
    from slimexport.pruning.stage import prune_model

    first = saved(shrunk("qwen3", DIFFERENT if layout == "per_layer" else SAME), tmp_path / "first")
    config = RunConfig(model=str(first), device="cpu")
    loaded = load_model(config)
    plan = make_plan(
        loaded.architecture, ratio=0.2, criterion="slimgpt", allocation="uniform", layout=layout, round_to=4
    )
    ids = torch.arange(640).reshape(20, 32) * 7 % 211
    again = prune_model(loaded, plan, CalibrationSet(ids, TextSource("t", 640, ""), 0), config)
    second, _ = slimexport.load(saved(again.model, tmp_path / "second"))
    assert torch.equal(logits(second), logits(again.model))
    assert architecture_of(second.config, "tiny").blocks == plan.blocks
    data = json.loads((tmp_path / "second" / "config.json").read_text())
    assert ("auto_map" in data) == ("per_layer_config" in data) == (layout == "per_layer")


def test_a_per_layer_checkpoint_that_becomes_uniform_is_plain_again(tmp_path: Path) -> None:
    model, _ = slimexport.load(saved(shrunk("llama", DIFFERENT), tmp_path / "first"))
    architecture = architecture_of(model.config, "tiny")
    for block, dense in zip(model.model.layers, architecture.blocks, strict=True):
        one = Kept((0,), (0,), tuple(range(32)), dense)
        shrink_block(block, architecture, one)
    apply_sizes(model.config, architecture, (one.sizes,) * 3)
    data = json.loads((saved(model, tmp_path / "second") / "config.json").read_text())
    assert not {"per_layer_config", "auto_map"} & set(data)
    assert not data.get("allow_global_per_layer_attribute_access")


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_implementation_can_be_changed_after_loading(family: str, tmp_path: Path) -> None:
    again, _ = slimexport.load(saved(shrunk(family, DIFFERENT), tmp_path / "c"))
    before = logits(again)
    again.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in again.model.layers} == {"eager"}
    torch.testing.assert_close(logits(again), before, rtol=1e-4, atol=1e-4)


def test_bfloat16_and_untied_embeddings(tmp_path: Path) -> None:
    model = shrunk("llama", DIFFERENT, tie_word_embeddings=False, dtype=torch.bfloat16)
    again, _ = slimexport.load(saved(model, tmp_path / "c"))
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_model_reads_per_layer_with_the_file_in_the_checkpoint(
    family: str, tmp_path: Path, monkeypatch: Any
) -> None:
    import transformers.dynamic_module_utils as remote
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(remote, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = shrunk(family, DIFFERENT)
    path = saved(model, tmp_path / "c")
    again = AutoModelForCausalLM.from_pretrained(str(path), trust_remote_code=True).eval()
    assert type(again).__module__.startswith("transformers_modules")
    assert torch.equal(logits(again), logits(model))


def test_stock_classes_fail_on_per_layer_instead_of_computing_something_else(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    path = saved(shrunk("llama", DIFFERENT), tmp_path / "c")
    with pytest.raises((RuntimeError, ValueError)):
        LlamaForCausalLM.from_pretrained(str(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_is_a_plain_checkpoint(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = shrunk(family, SAME)
    path = saved(model, tmp_path / "c")
    data = json.loads((path / "config.json").read_text())
    assert not {"per_layer_config", "auto_map", "allow_global_per_layer_attribute_access"} & set(data)
    assert (data["num_attention_heads"], data["num_key_value_heads"], data["intermediate_size"]) == (3, 3, 32)
    assert data["head_dim"] == 16
    assert data["rope_theta"] == data["rope_parameters"]["rope_theta"]  # transformers 4, vLLM and llama.cpp read this
    assert not list(path.glob("*.py"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(str(path)).eval()), logits(model))


def test_weights_are_as_small_as_the_plan_says(tmp_path: Path) -> None:
    model = shrunk("llama", DIFFERENT)
    path = saved(model, tmp_path / "c")
    expected = architecture_of(model.config, "tiny").estimates(4).bytes
    header = 8 + int.from_bytes((path / "model.safetensors").read_bytes()[:8], "little")
    assert (path / "model.safetensors").stat().st_size == expected + header


def test_fresh_process_reads_the_same_and_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    model = shrunk("qwen3", DIFFERENT)
    path = saved(model, tmp_path / "c")
    assert check_round_trip(model, path, seed=0) == 0.0
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(NotReproducedError, match="differs from the model in memory"):
        check_round_trip(model, path, seed=0)
    weights.write_bytes(bytes(data[: len(data) // 2]))
    with pytest.raises(NotReproducedError, match="does not load in a fresh process"):
        check_round_trip(model, path, seed=0)


def test_loading_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"no config\.json"):
        slimexport.load(tmp_path)


@pytest.mark.slow
def test_uniform_loads_where_slimexport_is_not_installed(tmp_path: Path) -> None:
    """A separate environment that sees torch and transformers, and no slimexport."""
    import site
    import venv

    model = shrunk("llama", SAME)
    path = saved(model, tmp_path / "c")
    torch.save(logits(model), tmp_path / "expected.pt")
    venv.create(tmp_path / "env", with_pip=False)
    packages = next(p for p in site.getsitepackages() if (Path(p) / "torch").is_dir())
    script = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "try:\n    import slimexport; raise SystemExit('slimexport is importable')\nexcept ImportError: pass\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(path)!r}).eval()\n"
        "with torch.no_grad(): l = m(torch.arange(40)[None] * 5, use_cache=False).logits\n"
        f"assert torch.equal(l, torch.load({str(tmp_path / 'expected.pt')!r}))\nprint('equal')\n"
    )
    # PYTHONPATH makes the packages visible without running .pth files, so the editable install stays out
    result = subprocess.run(
        [str(tmp_path / "env" / "bin" / "python"), "-c", script], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": packages, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=False,
    )  # fmt: skip
    assert result.stdout.strip() == "equal", result.stderr


def test_a_sentencepiece_file_comes_along(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.model").write_bytes(b"pieces")
    model = shrunk("llama", SAME)
    architecture = architecture_of(model.config, "tiny")
    plan = make_plan(architecture, ratio=0, criterion="slimgpt", allocation="incremental", layout="per_layer")
    (tmp_path / "small").mkdir()
    save_checkpoint(
        model, AutoTokenizer.from_pretrained(tmp_path / "dense"), architecture, plan, tmp_path / "small", card=""
    )
    assert (tmp_path / "small" / "tokenizer.model").read_bytes() == b"pieces"


def test_directories_of_a_tokenizer_can_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One with several chat templates has some of them in a directory."""
    tokenizer, model = tiny_tokenizer(), shrunk("llama", SAME)
    original = type(tokenizer).save_pretrained

    def save_pretrained(self: Any, directory: str, **more: Any) -> Any:
        (Path(directory) / "additional_chat_templates").mkdir()
        (Path(directory) / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
        return original(self, directory, **more)

    monkeypatch.setattr(type(tokenizer), "save_pretrained", save_pretrained)
    architecture = architecture_of(model.config, "tiny")
    plan = make_plan(architecture, ratio=0, criterion="slimgpt", allocation="incremental", layout="per_layer")
    (tmp_path / "small").mkdir()
    save_checkpoint(model, tokenizer, architecture, plan, tmp_path / "small", card="")
    place = tmp_path / "small" / "additional_chat_templates"
    assert place.stat().st_mode & 0o100
    assert (place / "tool_use.jinja").stat().st_mode & 0o777 == 0o644


def test_code_in_a_checkpoint_is_not_even_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks on the terminal, unless it is told."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "stranger", "auto_map": {
        "AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}))  # fmt: skip
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(str(words)) or "y")
    with pytest.raises(BadInputError, match="cannot be loaded"):
        slimexport.load(tmp_path)
    assert not asked
    assert not (tmp_path / "ran").exists()
