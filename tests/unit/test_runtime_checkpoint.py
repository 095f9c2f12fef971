"""Checkpoints in torch, called like graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import tiny_directory
from onnx_fixture import VOCAB, export_tiny, tiny_llama

from slimexport.errors import BadInputError
from slimexport.runtime import OnnxDecoder, open_decoder
from slimexport.runtime.checkpoint import CheckpointDecoder
from slimexport.verification.numerics import check_export
from slimexport.verification.perplexity import accuracy

IDS = np.random.default_rng(1).integers(0, VOCAB, (2, 12))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[CheckpointDecoder, OnnxDecoder, Any]:
    model, place = tiny_llama(), tmp_path_factory.mktemp("both")
    model.save_pretrained(place / "checkpoint")
    export_tiny(model, place / "onnx")
    checkpoint, graph = open_decoder(place / "checkpoint", threads=1), open_decoder(place / "onnx", threads=1)
    assert isinstance(checkpoint, CheckpointDecoder)
    assert isinstance(graph, OnnxDecoder)
    return checkpoint, graph, model


def test_it_says_what_the_graph_says(both: Any) -> None:
    checkpoint, graph, model = both
    check_export(checkpoint, model, steps=12)
    check_export(checkpoint, graph, steps=12)
    for one in (checkpoint, graph):
        assert (one.precision, one.vocab_size, one.max_positions) == ("fp32", VOCAB, 256)
    assert checkpoint.kv_bytes_per_token == graph.kv_bytes_per_token
    same = accuracy(checkpoint, graph, IDS.reshape(-1), window=12)
    assert same.kl is not None
    assert same.kl.max() < 1e-6
    timed = checkpoint.timed_greedy(IDS[0], 5)
    assert list(timed.tokens) == graph.greedy(IDS[0], 6).tokens.tolist()
    assert len(timed.token_seconds) == 5
    assert checkpoint.timed_batch(IDS, 2) > 0


@pytest.mark.parametrize("left", [True, False])
def test_padding_on_either_side(left: bool, both: Any) -> None:
    checkpoint = both[0]
    mask = np.ones((2, 12), np.int64)
    mask[1, slice(None, 5) if left else slice(7, None)] = 0
    kept = IDS[1][mask[1] == 1]
    alone, _ = checkpoint.last_logits(kept[None])
    padded, grown = checkpoint.last_logits(IDS, None, mask)
    np.testing.assert_allclose(padded[1], alone[0], atol=1e-3)
    assert grown.length == 12
    if left:
        step = np.array([[3], [3]])
        after, _ = checkpoint.last_logits(step, grown, np.concatenate([mask, np.ones((2, 1), np.int64)], 1))
        longer, _ = checkpoint.last_logits(np.concatenate([kept, [3]])[None])
        np.testing.assert_allclose(after[1], longer[0], atol=1e-3)


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        (np.zeros((1, 3)), None, "must be integers"),
        (np.array([[1, VOCAB]]), None, f"vocabulary is {VOCAB}"),
        (np.zeros((1, 257), np.int64), None, "257 tokens are more than the 256 positions"),
        (IDS, np.zeros((2, 12), np.int64), "attention_mask must be 0 and 1"),
    ],
    ids=["floats", "vocabulary", "positions", "mask"],
)
def test_impossible_inputs(ids: Any, mask: Any, words: str, both: Any) -> None:
    with pytest.raises(BadInputError, match=words):
        both[0].forward(ids, None, mask)


def test_another_batch_than_the_cache(both: Any) -> None:
    _, cache = both[0].forward(IDS)
    with pytest.raises(BadInputError, match="has batch 1"):
        both[0].forward(IDS[:1], cache)


def test_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"holds neither model\.onnx, model\.gguf nor a checkpoint"):
        open_decoder(tmp_path)
    place = tiny_directory(tmp_path / "model")
    with pytest.raises(BadInputError, match="torch on cpu or cuda, not on coreml"):
        open_decoder(place, "coreml")
