"""Blocks from disk: what is read and written is what the libraries read and write, and pruning does not notice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import tiny_text
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slimexport
from slimexport.checkpoint import save
from slimexport.config import RunConfig
from slimexport.errors import BadInputError
from slimexport.loading import load_model
from slimexport.pruning.stage import blocks_of
from slimexport.stages import prune as prune_stage
from slimexport.streaming.files import INDEX, SINGLE, TensorFiles, Wanted, write_tensors
from slimexport.testing.models import tiny_config, tiny_model, tiny_tokenizer

FAMILIES = ("llama", "qwen2", "gemma2", "gpt2", "phi3", "opt", "mixtral", "deepseek_v3")


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "b.weight": torch.randn(5, 7), "a.weight": torch.randn(3, 2).bfloat16(), "c": torch.tensor(3.0),
        "a.bias": torch.randn(4).half(), "mask": torch.ones(2, 3, dtype=torch.bool), "empty": torch.zeros(0, 4),
        "ids": torch.arange(6),
    }  # fmt: skip


def wanted(of: dict[str, torch.Tensor]) -> dict[str, Wanted]:
    return {name: Wanted(tensor.dtype, tuple(tensor.shape)) for name, tensor in of.items()}


def test_what_the_library_wrote_is_read(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / SINGLE)
    files = TensorFiles(tmp_path)
    assert set(files.places) == set(tensors())
    for name, tensor in tensors().items():
        assert files.read(name).dtype == tensor.dtype
        assert torch.equal(files.read(name), tensor)


def test_what_is_written_are_the_bytes_of_the_library(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "theirs", metadata={"format": "pt"})
    batches = [{name: tensor} for name, tensor in reversed(tensors().items())]
    write_tensors(tmp_path, wanted(tensors()), batches)
    assert (tmp_path / SINGLE).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_have_an_index_and_are_read_again(tmp_path: Path) -> None:
    of = tensors()
    write_tensors(tmp_path, wanted(of), [of], shard_bytes=100)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert (tmp_path / INDEX).is_file()
    assert all(torch.equal(TensorFiles(tmp_path).read(name), tensor) for name, tensor in of.items())
    theirs = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    assert set(theirs) == set(of)


def test_what_is_not_given_or_has_another_shape_is_noticed(tmp_path: Path) -> None:
    of = tensors()
    with pytest.raises(ValueError, match="1 tensors were not given, the first is ids"):
        write_tensors(tmp_path, wanted(of), [{name: of[name] for name in of if name != "ids"}])
    with pytest.raises(ValueError, match=r"ids is torch.int64 \(5,\)"):
        write_tensors(tmp_path, wanted(of), [{**of, "ids": torch.arange(5)}])


def test_files_that_are_cut_off_or_missing_are_named(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / SINGLE)
    files = TensorFiles(tmp_path)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:-20])
    last = max(files.places, key=lambda name: files.places[name].start)
    with pytest.raises(BadInputError, match=rf"{SINGLE} is truncated: it ends within tensor {last}"):
        files.read(last)
    (tmp_path / SINGLE).write_bytes(whole[:40])
    with pytest.raises(BadInputError, match="header does not fit into 40 bytes"):
        TensorFiles(tmp_path)
    (tmp_path / SINGLE).unlink()
    with pytest.raises(BadInputError, match=f"{SINGLE} is missing"):
        TensorFiles(tmp_path)


def saved(place: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **options: object) -> Path:
    model = tiny_model(tiny_config(family, **options), seed=3).to(dtype)
    model.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_from_disk_computes_what_it_computes_in_memory(tmp_path: Path, family: str) -> None:
    place = saved(tmp_path / "model", family)
    loaded = load_model(RunConfig(model=str(place)), streamed=True)
    whole = AutoModelForCausalLM.from_pretrained(place)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = whole(ids, use_cache=False).logits
        blocks = blocks_of(loaded, torch.float32)
        inside = loaded.architecture.family.blocks
        if loaded.files is not None:
            assert all(p.is_meta == n.startswith(inside) for n, p in loaded.model.named_parameters())
        with blocks.running():
            assert torch.equal(loaded.model(ids, use_cache=False).logits, expected)
        if loaded.files is not None:
            assert all(p.is_meta == n.startswith(inside) for n, p in loaded.model.named_parameters())


def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on; without the check in a fresh process, which takes long and is made of the others."""
    monkeypatch.setattr(prune_stage, "block_by_block", lambda config: False)
    monkeypatch.setattr(save, "check_round_trip", lambda *_, **__: 0.0)


def pruned(model: Path, out: Path, **options: object) -> dict[str, bytes]:
    text = tiny_text(out.parent / "text.txt", 1500, seed=1)
    slimexport.prune(
        RunConfig(model=str(model), calibration=str(text), calibration_tokens=512, sequence_length=32, probe_tokens=64,
                  round_to=8, ratio=0.3, **options), out
    )  # fmt: skip
    return {path.name: path.read_bytes() for path in sorted((out / "checkpoint").iterdir())}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gemma2", {"save_dtype": "bfloat16", "fast": True}),
        ("gpt2", {"fast": True}),
        ("mistral", {"allocation": "search", "search_evaluations": 4}),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else value,
)
def test_pruning_from_disk_writes_the_same_bytes(
    tmp_path: Path, family: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = saved(tmp_path / "model", family)
    assert load_model(RunConfig(model=str(place)), streamed=True).files is not None
    from_disk = pruned(place, tmp_path / "disk", **options)
    in_memory(monkeypatch)
    as_before = pruned(place, tmp_path / "memory", **options)
    assert set(from_disk) == set(as_before)
    for name, data in from_disk.items():
        assert data == as_before[name], name


def test_a_pruned_model_is_pruned_again_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of different sizes."""
    pruned(saved(tmp_path / "model"), tmp_path / "once", fast=True)
    again = tmp_path / "once" / "checkpoint"
    assert load_model(RunConfig(model=str(again)), streamed=True).files is not None
    from_disk = pruned(again, tmp_path / "disk", fast=True)
    in_memory(monkeypatch)
    assert from_disk == pruned(again, tmp_path / "memory", fast=True)


def test_tensors_under_other_names_are_loaded_whole(tmp_path: Path) -> None:
    place = saved(tmp_path / "model")
    found = load_file(place / SINGLE)
    save_file({name.removeprefix("model."): tensor for name, tensor in found.items()}, place / SINGLE)
    assert load_model(RunConfig(model=str(place)), streamed=True).files is None


def test_an_index_that_is_none_is_refused_and_no_reason_to_stop_a_plan(tmp_path: Path) -> None:
    place = saved(tmp_path / "model")
    (place / INDEX).write_text("{}")
    (place / SINGLE).unlink()
    with pytest.raises(BadInputError, match=rf"{INDEX} is not a valid safetensors index \(KeyError"):
        TensorFiles(place)
    assert slimexport.plan(RunConfig(model=str(place), fast=True)).cost is not None


def test_a_head_of_its_own_counts_whatever_the_config_says(tmp_path: Path) -> None:
    """transformers does not tie then either; the same tensor twice is one."""
    place = saved(tmp_path / "model", tie_word_embeddings=True)
    found = load_file(place / SINGLE)
    embedding = found["model.embed_tokens.weight"]
    save_file({**found, "lm_head.weight": embedding.clone()}, place / SINGLE, metadata={"format": "pt"})
    tied = load_model(RunConfig(model=str(place)), streamed=True)
    assert tied.files is not None
    assert tied.architecture.tied
    head = torch.randn(embedding.shape)
    save_file({**found, "lm_head.weight": head}, place / SINGLE, metadata={"format": "pt"})
    for streamed in (True, False):
        loaded = load_model(RunConfig(model=str(place)), streamed=streamed)
        assert torch.equal(loaded.model.lm_head.weight, head)
        assert not loaded.architecture.tied
        assert not loaded.model.config.tie_word_embeddings
    out = tmp_path / "out"
    pruned(place, out, fast=True)
    assert torch.equal(load_file(out / "checkpoint" / SINGLE)["lm_head.weight"], head)


def test_tensors_that_are_compared_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimexport.streaming.files.CHUNK_BYTES", 16)
    one = torch.randn(5, 7)
    other = one.clone()
    other[4, 6] += 1
    save_file({"a": one, "b": one.clone(), "c": other, "d": one.clone().reshape(7, 5)}, tmp_path / SINGLE)
    files = TensorFiles(tmp_path)
    assert [files.same("a", name) for name in "abcd"] == [True, True, False, False]


def test_an_index_that_was_left_behind_does_not_count(tmp_path: Path) -> None:
    """As for transformers."""
    place = saved(tmp_path / "model")
    (place / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    loaded = load_model(RunConfig(model=str(place)), streamed=True)
    assert loaded.files is not None
    assert {path.name for path in (of.path for of in loaded.files.places.values())} == {SINGLE}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_that_are_computed_are_not_rounded(tmp_path: Path, dtype: torch.dtype) -> None:
    """GPT-J's positions; in float32, as transformers makes them."""
    place = saved(tmp_path / "model", "gptj", dtype)
    loaded, whole = (load_model(RunConfig(model=str(place)), streamed=streamed) for streamed in (True, False))
    assert loaded.files is not None
    expected = dict(whole.model.named_buffers())
    assert expected
    for name, buffer in loaded.model.named_buffers():
        assert torch.equal(buffer, expected[name]), name


def test_an_adapter_beside_a_model_is_refused(tmp_path: Path) -> None:
    place = saved(tmp_path / "model")
    (place / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInputError, match="merge the adapter into the weights, or move that file away"):
        slimexport.plan(RunConfig(model=str(place), fast=True))
