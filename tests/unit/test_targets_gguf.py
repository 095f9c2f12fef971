"""What goes into a GGUF file: names, order of rows, numbers, tokens. Nothing here runs llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from slimexport.errors import BadInputError
from slimexport.runtime.llama_cpp import _BITS
from slimexport.targets import base
from slimexport.targets.gguf import file, precision
from slimexport.targets.gguf.tensors import file_name, neighbours
from slimexport.targets.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, vocabulary_of


def test_names() -> None:
    assert file_name("model.embed_tokens.weight") == "token_embd.weight"
    assert file_name("model.layers.17.self_attn.q_proj.bias") == "blk.17.attn_q.bias"
    assert file_name("model.layers.3.post_attention_layernorm.weight") == "blk.3.ffn_norm.weight"
    for name in ("model.layers.0.mlp.experts.0.w1", "model.layers.0.self_attn.rotary.weight", "other.weight"):
        with pytest.raises(BadInputError, match="has no place in a GGUF file"):
            file_name(name)


def test_neighbours_turn_as_halves_did() -> None:
    """Rotating halves, and then reordering, is rotating neighbours of what was reordered."""
    rng = np.random.default_rng(0)
    rows, angle = rng.standard_normal((3 * 8, 5)), rng.standard_normal(4)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    halves = rows.reshape(3, 2, 4, 5)
    turned = np.stack([halves[:, 0] * cos - halves[:, 1] * sin, halves[:, 1] * cos + halves[:, 0] * sin], 1)
    pairs = neighbours(rows, 8).reshape(3, 4, 2, 5)
    theirs = np.stack([pairs[:, :, 0] * cos - pairs[:, :, 1] * sin, pairs[:, :, 1] * cos + pairs[:, :, 0] * sin], 2)
    np.testing.assert_array_equal(neighbours(turned.reshape(24, 5), 8), theirs.reshape(24, 5))
    bias = np.arange(8.0)
    assert neighbours(bias, 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_every_precision_has_types_and_bits() -> None:
    assert set(precision._TYPES) == set(_BITS) == set(base.PRECISIONS)
    for name in base.PRECISIONS:
        assert precision.file_type(name) >= 0


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("spread", [1e-7, 1e-4, 1.0, 300.0])
def test_rounding_keeps_to_its_bound(name: str, spread: float) -> None:
    """And is not far below it: half a level is reached."""
    array = (spread * np.random.default_rng(0).standard_normal((64, 256))).astype(np.float32)
    array[0, :32] = 0
    array[1, :32] = 3 * spread
    kind = precision.type_of("blk.0.attn_q.weight", array, name)
    off = np.abs(precision.read(precision.stored(array, kind), kind, array.shape).astype(np.float64) - array)
    allowed = precision.bound(array, kind)
    assert allowed is not None
    share = off.reshape(allowed.shape) / np.maximum(allowed, 1e-300)
    assert share.max() <= 1
    if spread >= 1:
        assert share.max() > 0.7


@pytest.mark.parametrize("name", base.PRECISIONS)
def test_a_file_is_read_back(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    shapes = {"token_embd.weight": (7, 64), "blk.0.ffn_down.weight": (64, 33), "output_norm.weight": (64,)}
    tensors = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    fields = {"a.text": "x", "a.yes": True, "a.count": 3, "a.float": 1e-6, "a.list": [3, 1], "a.words": ["é", "b c"]}
    file.write(tmp_path / "m.gguf", "a", fields, tensors, name)
    file.check(tmp_path / "m.gguf", "a", fields, tensors, name)
    found = file.meant(tmp_path / "m.gguf", shapes)
    np.testing.assert_array_equal(found["output_norm.weight"], tensors["output_norm.weight"])
    for key in shapes:
        np.testing.assert_allclose(found[key], tensors[key], atol=0.3)


# ------------------------------------------------------------------------------------------------------------ tokens


def bpe(**parts: Any) -> Any:
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**alphabet, "ab": 256}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(backend, name, part)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    made.add_tokens(["<tool>"])
    return made


def test_tokens_and_their_kinds() -> None:
    tokenizer = bpe()
    tokenizer.chat_template = "{{ messages }}"
    made = vocabulary_of(tokenizer, 264)
    assert made.tokens[256:] == ("ab", "<s>", "</s>", "<tool>", "[PAD260]", "[PAD261]", "[PAD262]", "[PAD263]")
    assert made.kinds[256:] == (NORMAL, CONTROL, CONTROL, USER_DEFINED, *[UNUSED] * 4)
    assert (made.model, made.merges) == ("gpt2", (("a", "b"),))
    assert made.special == {"bos": 257, "eos": 258}
    assert (made.add_bos, made.add_eos, made.notes) == (False, False, ())
    fields = made.fields()
    assert fields["tokenizer.ggml.merges"] == ["a b"]
    assert fields["tokenizer.ggml.eos_token_id"] == 258
    assert fields["tokenizer.chat_template"] == "{{ messages }}"


def test_what_stands_around_a_text() -> None:
    around = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 257), ("</s>", 258)])
    made = vocabulary_of(bpe(post_processor=around), 260)
    assert (made.add_bos, made.add_eos) == (True, True)
    twice = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 257)])
    with pytest.raises(BadInputError, match="adds a first and a last token at most"):
        vocabulary_of(bpe(post_processor=twice), 260)


def test_a_unicode_form_is_said() -> None:
    made = vocabulary_of(bpe(normalizer=normalizers.NFC()), 260)
    assert "NFC" in made.notes[0]


def words() -> Any:
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def endless() -> Any:
    made = bpe()
    made.eos_token = None
    return made


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (words, "is WordLevel: BPE of bytes"),
        (lambda: bpe(normalizer=normalizers.Lowercase()), r"normalises text \(Lowercase\)"),
        (lambda: bpe(pre_tokenizer=pre_tokenizers.Whitespace()), "is BPE of characters"),
        (endless, "names no token that ends a text"),
    ],
)
def test_tokenizers_that_are_refused(make: Any, said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        vocabulary_of(make(), 300)


def test_more_tokens_than_the_model_has() -> None:
    with pytest.raises(BadInputError, match="the model has 259 tokens"):
        vocabulary_of(bpe(), 259)


def test_pieces_have_scores_and_bytes() -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, "<0x41>": 2, "a": 3, "b": 4, "c": 5, "ab": 6, "abc": 7}
    merges = [("a", "b"), ("ab", "c")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    made = vocabulary_of(tokenizer, 8)
    assert made.model == "llama"
    assert made.kinds == (UNKNOWN, CONTROL, BYTE, *[NORMAL] * 5)
    assert made.fields()["tokenizer.ggml.scores"] == [-2, -2, -2, -2, -2, -2, 0, -1]
