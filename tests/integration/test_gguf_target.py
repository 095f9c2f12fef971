"""The `gguf` target in llama.cpp itself: every family, layout and precision, and files that are wrong in one place."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_fixture import DIFFERENT, FAMILIES, VOCAB, bpe, export, logits_of, per_layer, pieces, tiny

from slimexport.artifacts import BlockSizes
from slimexport.errors import BadInputError, NotReproducedError
from slimexport.runtime import LlamaCppDecoder, open_decoder
from slimexport.targets import registry
from slimexport.targets.base import ExportOptions, load_artifact
from slimexport.targets.gguf import file, tensors
from slimexport.targets.gguf import target as target_module
from slimexport.verification.footprint import export_bytes
from slimexport.verification.numerics import check_export

pytest.importorskip("xllamacpp")

IDS = np.random.default_rng(0).integers(0, VOCAB, (2, 24))
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


def decoder_of(artifact: Any) -> LlamaCppDecoder:
    decoder = open_decoder(Path(artifact.path), threads=1)
    assert isinstance(decoder, LlamaCppDecoder)
    return decoder


def read(artifact: Any) -> Any:
    from gguf import GGUFReader

    return GGUFReader(Path(artifact.path) / "model.gguf")


# -------------------------------------------------------------------------------------------------------- what is right


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    decoder = decoder_of(export(tmp_path / "out", model))
    expected = logits_of(model, IDS)
    np.testing.assert_allclose(decoder.forward(IDS)[0], expected, atol=1e-3 * expected.std())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_blocks_that_differ(family: str, tmp_path: Path) -> None:
    model = per_layer(family)
    artifact = export(tmp_path / "out", model)
    expected = logits_of(model, IDS)
    np.testing.assert_allclose(decoder_of(artifact).forward(IDS)[0], expected, atol=1e-3 * expected.std())
    fields = read(artifact).fields
    assert fields["general.architecture"].contents() == "deci"
    assert fields["deci.attention.head_count"].contents() == [2, 8, 2]
    assert fields["deci.attention.head_count_kv"].contents() == [2, 4, 1]
    assert fields["deci.feed_forward_length"].contents() == [64, 96, 32]
    assert artifact.kv_heads == (2, 4, 1)
    assert decoder_of(artifact).kv_bytes_per_token == 2 * 7 * 16 * 4


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
        {"rms_norm_eps": 0.1},
    ],
    ids=["tied", "llama3", "linear", "eps"],
)
@pytest.mark.parametrize("make", [tiny, per_layer])
def test_what_a_config_can_say(make: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    artifact = export(tmp_path / "out", make("llama", **changes))
    names = {tensor.name for tensor in read(artifact).tensors}
    assert ("output.weight" in names) == ("tie_word_embeddings" not in changes)
    assert ("rope_freqs.weight" in names) == ("rope_parameters" in changes)


def test_equal_blocks_that_a_plain_config_cannot_say_are_llama(tmp_path: Path) -> None:
    model = per_layer("llama", (BlockSizes(3, 1, 64),) * 3)
    assert model.config.is_heterogeneous
    assert read(export(tmp_path / "out", model)).fields["general.architecture"].contents() == "llama"


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4", "int4-mixed"])
@pytest.mark.parametrize("make", [tiny, per_layer])
def test_precisions(make: Any, precision: str, tmp_path: Path) -> None:
    artifact = export(tmp_path / "out", make("mistral"), precision=precision)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in read(artifact).tensors}
    matrix = {"fp16": "F16", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_1", "int4-mixed": "Q4_1"}[precision]
    assert kinds["blk.1.ffn_down.weight"] == kinds["blk.0.attn_q.weight"] == matrix
    assert kinds["output.weight"] == kinds["token_embd.weight"] == ("Q8_0" if precision == "int4-mixed" else matrix)
    assert kinds["blk.1.attn_norm.weight"] == "F32"
    assert (artifact.precision, artifact.float_bytes) == (precision, 0)
    assert load_artifact(tmp_path / "out").files == artifact.files
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "model.gguf"]
    assert export_bytes(tmp_path / "out") == (tmp_path / "out" / "model.gguf").stat().st_size


def test_rows_that_no_block_fits_stay_float(tmp_path: Path) -> None:
    model = per_layer("llama", (DIFFERENT[0], BlockSizes(4, 2, 90), DIFFERENT[2]))
    artifact = export(tmp_path / "out", model, precision="int8")
    assert artifact.float_bytes == 2 * 64 * 90
    assert "no multiple of 32" in artifact.notes[-1]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in read(artifact).tensors}
    assert kinds["blk.1.ffn_down.weight"] == "F16"
    assert kinds["blk.1.ffn_up.weight"] == "Q8_0"


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = (export(tmp_path / name, tiny(), precision="int4") for name in "ab")
    assert one.files == other.files


# ----------------------------------------------------------------------------------------------------- how it is called


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaCppDecoder, Any]:
    model = per_layer()
    return decoder_of(export(tmp_path_factory.mktemp("opened") / "out", model)), model


@pytest.mark.parametrize("left", [True, False])
def test_padding_on_either_side(left: bool, opened: Any) -> None:
    decoder, model = opened
    mask = np.ones_like(IDS)
    mask[1, slice(None, 9) if left else slice(15, None)] = 0
    kept = IDS[1][mask[1] == 1]
    expected = logits_of(model, kept[None])[0]
    atol = 1e-3 * expected.std()
    whole, _ = decoder.forward(IDS, None, mask)
    np.testing.assert_allclose(whole[1][mask[1] == 1], expected, atol=atol)
    last, grown = decoder.last_logits(IDS, None, mask)
    np.testing.assert_allclose(last[1], expected[-1], atol=atol)
    step, _ = decoder.last_logits(np.array([[3], [4]]), grown, np.concatenate([mask, [[1], [1]]], 1))
    np.testing.assert_allclose(step[1], logits_of(model, np.append(kept, 4)[None])[0, -1], atol=atol)


def test_a_cache_grows_and_is_used_once(opened: Any) -> None:
    decoder, model = opened
    ids = np.random.default_rng(2).integers(0, VOCAB, (2, 250))
    cache = decoder.room(2, 3)
    pieces = []
    for start, end in ((0, 3), (3, 130), (130, 250)):
        before = cache
        logits, cache = decoder.forward(ids[:, start:end], cache)
        pieces.append(logits)
    expected = logits_of(model, ids)
    np.testing.assert_allclose(np.concatenate(pieces, 1), expected, atol=1e-3 * expected.std())
    with pytest.raises(BadInputError, match="passed to another call already"):
        decoder.last_logits(ids[:, :1], before)
    with pytest.raises(BadInputError, match="more than the 256 positions"):
        decoder.last_logits(ids[:, :7], cache)
    with pytest.raises(BadInputError, match="masks tokens that are in the cache"):
        decoder.last_logits(ids[:, :1], cache, np.eye(2, 251, dtype=np.int64) + np.eye(1, 251, 250, dtype=np.int64))


def test_a_cache_moves_to_more_memory(opened: Any) -> None:
    decoder, model = opened
    expected = logits_of(model, IDS)
    cache = decoder.room(2, 24)
    cache.lease.context.capacity = 8  # as if it had no more
    first, cache = decoder.forward(IDS[:, :8], cache)
    moved, grown = decoder.forward(IDS[:, 8:], cache)
    assert grown.lease is not cache.lease
    np.testing.assert_allclose(np.concatenate([first, moved], 1), expected, atol=1e-3 * expected.std())


def test_it_is_on_the_cpu(opened: Any) -> None:
    with pytest.raises(BadInputError, match="on the CPU here, not on cuda"):
        LlamaCppDecoder(opened[0].directory, provider="cuda")


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"JUNK is not enough")
    with pytest.raises(BadInputError, match=r"llama\.cpp cannot open it: .*magic"):
        open_decoder(tmp_path)


# ------------------------------------------------------------------------------------------------------- what is wrong


def poke(path: Path, name: str, change: Any) -> None:
    """Changes the stored bytes of one tensor in place."""
    from gguf import GGUFReader

    found = {tensor.name: tensor for tensor in GGUFReader(path, "r+").tensors}
    data = found[name].data
    change(data)
    data.base.flush() if hasattr(data.base, "flush") else None


def halved_scale(data: Any) -> None:
    row = data[5].view(np.uint8)
    row[34:36].view(np.float16)[:] *= 0.5  # of the second block in Q8_0


def moved_code(data: Any) -> None:
    data[3].view(np.uint8)[6] ^= 0x40


@pytest.mark.parametrize(
    ("precision", "name", "change"),
    [
        ("fp32", "blk.1.ffn_up.weight", lambda data: data.__setitem__((3, 4), data[3, 4] + 0.01)),
        ("fp16", "blk.0.attn_k.weight", lambda data: data.__setitem__((0, 0), data[0, 0] * 1.1)),
        ("int8", "blk.1.attn_output.weight", halved_scale),
        ("int4", "blk.2.ffn_gate.weight", moved_code),
        ("int4-mixed", "token_embd.weight", halved_scale),
        ("int8", "blk.1.ffn_norm.weight", lambda data: data.__setitem__(7, data[7] * 1.05)),
    ],
)
def test_one_tensor_that_changed(
    precision: str, name: str, change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = file.write

    def broken(path: Path, architecture: str, fields: Any, tensors: Any, written: str) -> None:
        real(path, architecture, fields, tensors, written)
        if written == precision and path.parent == tmp_path / "out":
            poke(path, name, change)

    monkeypatch.setattr(file, "write", broken)
    with pytest.raises(NotReproducedError, match=name):
        export(tmp_path / "out", tiny("llama", num_hidden_layers=3), precision=precision)


@pytest.mark.parametrize(("make", "precision"), [(tiny, "fp32"), (tiny, "fp16"), (per_layer, "int4")])
def test_rows_in_the_wrong_order(make: Any, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "neighbours", lambda rows, head_dim: rows)
    with pytest.raises(NotReproducedError, match="does not compute what the model computes"):
        export(tmp_path / "out", make(), precision=precision)


@pytest.mark.parametrize(
    "key", ["llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon", "llama.attention.head_count_kv"]
)
def test_a_header_that_says_something_else(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = target_module.header

    def broken(*arguments: Any) -> Any:
        made = real(*arguments)
        made[key] = {"llama.rope.freq_base": 2e4, "llama.attention.head_count_kv": 2}.get(key, 0.1)
        return made

    monkeypatch.setattr(target_module, "header", broken)
    with pytest.raises((NotReproducedError, BadInputError), match=r"does not compute|cannot open it"):
        export(tmp_path / "out", tiny("mistral"), precision="int8")


def test_a_file_that_was_written_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = file.write
    model = tiny()

    def write(change: Any) -> None:
        def broken(path: Path, architecture: str, fields: Any, tensors: Any, precision: str) -> None:
            fields, tensors = dict(fields), dict(tensors)
            change(fields, tensors)
            real(path, architecture, fields, tensors, precision)

        monkeypatch.setattr(file, "write", broken)

    content = target_module._Content
    made: list[Any] = []
    monkeypatch.setattr(target_module, "_Content", lambda *of: made.append(content(*of)) or made[-1])
    export(tmp_path / "right", model)
    for number, (change, words) in enumerate(
        (
            (lambda fields, tensors: fields.update({"llama.context_length": 99}), "llama.context_length is not"),
            (lambda fields, tensors: fields.pop("tokenizer.ggml.add_bos_token"), "add_bos_token is not"),
            (lambda fields, tensors: fields.update(extra="x"), "exactly what was written: extra"),
            (
                lambda fields, tensors: tensors.pop("blk.1.attn_q.bias"),
                r"exactly what was written: blk\.1\.attn_q\.bias",
            ),
        )
    ):
        write(change)
        place = tmp_path / str(number)
        place.mkdir()
        with pytest.raises(NotReproducedError, match=words):
            made[0].write(place, "fp32")


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3", {}, "no qwen3 model whose blocks differ in size"),
        ("mistral", {"sliding_window": 12}, "a window of 12 tokens"),
        ("llama", {"hidden_act": "gelu"}, "its FFN has gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "scaled as dynamic"),
    ],
)
def test_models_that_are_refused(family: str, changes: dict[str, Any], words: str) -> None:
    from slimexport.architectures import architecture_of

    config = tiny(family, **changes).config
    with pytest.raises(BadInputError, match=words):
        registry.get("gguf").check_model(config, architecture_of(config, "tiny"), ExportOptions(per_layer=True))


def test_options_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from slimexport.runtime import llama_api

    with pytest.raises(BadInputError, match="on the CPU here, not on cuda"):
        registry.get("gguf").check_options(ExportOptions(provider="cuda"))
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    llama_api._library.cache_clear()
    with pytest.raises(BadInputError, match=r"xllamacpp is missing: pip install 'slimexport\[gguf\]'"):
        registry.get("gguf").check_options(ExportOptions())
    llama_api._library.cache_clear()


def test_a_wheel_that_is_unlike_the_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimexport.runtime import llama_api

    llama_api._library.cache_clear()
    monkeypatch.setitem(llama_api._FUNCTIONS, "llama_no_such_function", (None, ()))
    with pytest.raises(
        BadInputError, match=r"is unlike .* which is known to work: it does not show llama_no_such_function"
    ):
        llama_api.require()
    monkeypatch.undo()
    llama_api._library.cache_clear()
    llama_api.require()


def test_two_decoders_check_each_other(opened: Any, tmp_path: Path) -> None:
    decoder, model = opened
    check_export(decoder, decoder_of(export(tmp_path / "out", model)), steps=4)
    assert dataclasses.asdict(decoder.artifact)["target"] == "gguf"


def test_the_digits_of_a_tokenizer_decide_the_name(tmp_path: Path) -> None:
    plain, single = (export(tmp_path / str(d), tiny(), bpe(digits=d)) for d in (False, True))
    assert "pre-tokenizer gpt-2" in plain.notes[0]
    assert "pre-tokenizer smollm" in single.notes[0]


@pytest.mark.parametrize(("legacy", "name"), [(True, "default, space before"), (False, "default.")])
def test_sentencepiece(legacy: bool, name: str, tmp_path: Path) -> None:
    tokenizer = pieces(legacy)
    artifact = export(tmp_path / "out", tiny("mistral", vocab_size=len(tokenizer)), tokenizer)
    assert f"pre-tokenizer {name}" in artifact.notes[0]
    fields = read(artifact).fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    model = decoder_of(artifact).model
    for text in ("prune the weights of  models", "it's 2024; 日本", "</s>model<s> in"):
        assert model.tokenize(text, special=True) == tokenizer(text).input_ids, text


def test_a_way_that_llama_cpp_has_not(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    tokenizer = bpe()
    words = [pre_tokenizers.Split("e", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    with pytest.raises(BadInputError, match="in none of its ways like this tokenizer"):
        registry.get("gguf").check_tokenizer(tokenizer, VOCAB)
