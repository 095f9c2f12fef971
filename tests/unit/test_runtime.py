"""The runtime against torch: logits, cache, greedy tokens, and the inputs and providers it refuses."""

from __future__ import annotations

import builtins
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from onnx_fixture import HEAD_DIM, VOCAB, export_tiny, tiny_llama

from slimexport.artifacts import read_json, write_json
from slimexport.errors import BadInputError
from slimexport.machine import cores
from slimexport.machine.cores import checked_threads, default_threads
from slimexport.runtime import OnnxDecoder

IDS = np.array([[5, 17, 3, 80, 41, 9, 2, 66, 31, 7]], np.int64)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("runtime") / "onnx"
    export_tiny(model, path)
    return path


@pytest.fixture(scope="module")
def decoder(directory):
    return OnnxDecoder(directory, threads=1)


def torch_logits(model, ids, mask=None):
    with torch.no_grad():
        mask = None if mask is None else torch.from_numpy(mask)
        return model(torch.from_numpy(ids), attention_mask=mask).logits.numpy()


def test_prefill_decode_and_chunk_match_torch(model, decoder):
    expected = torch_logits(model, IDS)
    prefill, cache = decoder.forward(IDS[:, :5])
    step, cache = decoder.forward(IDS[:, 5:6], cache)
    chunk, cache = decoder.forward(IDS[:, 6:], cache)
    got = np.concatenate([prefill, step, chunk], axis=1)
    assert got.dtype == np.float32
    assert got.shape == (1, 10, VOCAB)
    np.testing.assert_allclose(got, expected, atol=1e-4 * expected.std())
    assert (cache.batch, cache.length) == (1, 10)


def test_a_cache_can_be_used_twice(decoder):
    """Outputs of a later call must not overwrite a cache that somebody still holds."""
    _, cache = decoder.forward(IDS[:, :5])
    first, _ = decoder.forward(IDS[:, 5:6], cache)
    first = first.copy()
    decoder.forward(IDS[:, 7:8], cache)
    again, _ = decoder.forward(IDS[:, 5:6], cache)
    np.testing.assert_array_equal(first, again)


def test_a_cache_with_room_is_written_in_place(model, decoder):
    expected = torch_logits(model, IDS)
    room = decoder.room(1, 12)
    addresses = [value.data_ptr() for value in room.values]
    prefill, cache = decoder.forward(IDS[:, :5], room)
    step, cache = decoder.forward(IDS[:, 5:6], cache)
    chunk, cache = decoder.forward(IDS[:, 6:], cache)
    np.testing.assert_allclose(np.concatenate([prefill, step, chunk], 1), expected, atol=1e-4 * expected.std())
    assert [value.data_ptr() for value in cache.values] == addresses
    assert (cache.length, cache.capacity) == (10, 12)
    with pytest.raises(BadInputError, match="13 tokens are more than the 12 that there is room for"):
        decoder.forward(IDS[:, :3], cache)
    # An earlier state is still what it was, whatever was written after it.
    again, shorter = decoder.forward(IDS[:, :5], room)
    np.testing.assert_array_equal(again, prefill)
    decoder.forward(IDS[:, 7:8], shorter)
    np.testing.assert_array_equal(decoder.forward(IDS[:, 5:6], shorter)[0], step)


def test_batches_have_room_too(model, decoder):
    ids = np.concatenate([IDS, IDS[:, ::-1]])
    _, cache = decoder.forward(ids[:, :8], decoder.room(2, 10))
    got, _ = decoder.forward(ids[:, 8:9], cache)
    np.testing.assert_allclose(got[:, 0], torch_logits(model, ids)[:, 8], atol=1e-3)


def test_no_room_where_the_manifest_does_not_say_so(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "onnx")
    write_json(copy / "export.json", {**read_json(copy / "export.json"), "shared_kv": False})
    assert OnnxDecoder(copy).room(1, 8) is None
    assert (
        OnnxDecoder(copy).greedy(IDS[0], 5).tokens.tolist() == OnnxDecoder(directory).greedy(IDS[0], 5).tokens.tolist()
    )


def test_greedy_matches_transformers(model, decoder):
    with torch.no_grad():
        expected = model.generate(torch.from_numpy(IDS), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    greedy = decoder.greedy(IDS[0], 12)
    assert greedy.tokens.tolist() == expected[0, IDS.shape[1] :].tolist()
    top = np.sort(torch_logits(model, IDS)[0, -1])
    assert greedy.margins[0] == pytest.approx(top[-1] - top[-2], abs=1e-3)
    assert (greedy.margins >= 0).all()


def test_timed_greedy_gives_the_same_tokens(decoder):
    timed = decoder.timed_greedy(IDS[0], 6)
    assert list(timed.tokens) == decoder.greedy(IDS[0], 7).tokens.tolist()
    assert len(timed.token_seconds) == 6
    assert timed.ttft_seconds > 0
    assert min(timed.token_seconds) > 0


def test_right_padding_is_right_and_left_padding_is_refused(model, decoder):
    ids = np.concatenate([IDS[:, :6], IDS[:, 4:]])
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    got, _ = decoder.forward(ids, attention_mask=mask)
    expected = torch_logits(model, ids, mask)
    np.testing.assert_allclose(got[0, :4], expected[0, :4], atol=1e-3)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-3)
    with pytest.raises(BadInputError, match="left padding"):
        decoder.forward(ids, attention_mask=mask[:, ::-1].copy())


def test_left_padding_is_refused_only_where_the_manifest_says_so(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "onnx")
    mask = np.array([[0, 1, 1, 1]])
    write_json(copy / "export.json", {**read_json(copy / "export.json"), "left_padding": True})
    assert OnnxDecoder(copy).forward(IDS[:, :4], attention_mask=mask)[0].shape == (1, 4, VOCAB)
    (copy / "export.json").unlink()
    with pytest.raises(BadInputError, match="left padding"):
        OnnxDecoder(copy).forward(IDS[:, :4], attention_mask=mask)


def test_signature_without_a_manifest(directory, decoder, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "onnx")
    (copy / "export.json").unlink()
    bare = OnnxDecoder(copy)
    assert bare.signature == decoder.signature
    assert [(c.block, c.shape) for c in bare.signature.caches[::2]] == [(n, (2, None, HEAD_DIM)) for n in range(3)]
    assert bare.signature.kv_bytes_per_token == 3 * 2 * 2 * HEAD_DIM * 4


@pytest.mark.parametrize(
    ("ids", "mask", "match"),
    [
        (IDS[0], None, "batch, tokens"),
        (IDS.astype(np.float32), None, "batch, tokens"),
        (IDS[:, :0], None, "batch, tokens"),
        (IDS - 3, None, "vocabulary is 96"),
        (IDS + VOCAB, None, "vocabulary is 96"),
        (np.ones((1, 257), np.int64), None, "256 positions"),
        (IDS, np.ones((1, 9), np.int64), "attention_mask"),
        (IDS, np.zeros((1, 10), np.int64), "attention_mask"),
        (IDS, np.full((1, 10), 2), "attention_mask"),
    ],
)
def test_impossible_inputs_are_named(decoder, ids, mask, match):
    with pytest.raises(BadInputError, match=match):
        decoder.forward(ids, attention_mask=mask)


def test_a_cache_of_another_batch_is_refused(decoder):
    _, cache = decoder.forward(IDS)
    with pytest.raises(BadInputError, match="batch 2"):
        decoder.forward(np.repeat(IDS[:, :1], 2, axis=0), cache)


def test_missing_and_corrupt_files_are_named(directory, tmp_path):
    with pytest.raises(BadInputError, match=r"model\.onnx does not exist"):
        OnnxDecoder(tmp_path)
    cut = shutil.copytree(directory, tmp_path / "cut")
    (cut / "model.onnx").write_bytes((cut / "model.onnx").read_bytes()[:1000])
    with pytest.raises(BadInputError, match=r"cut/model\.onnx: ONNX Runtime cannot open it"):
        OnnxDecoder(cut)
    no_weights = shutil.copytree(directory, tmp_path / "no_weights")
    (no_weights / "model.onnx.data").unlink()
    with pytest.raises(BadInputError, match="cannot open it"):
        OnnxDecoder(no_weights)
    wrong = shutil.copytree(directory, tmp_path / "wrong")
    manifest = read_json(wrong / "export.json")
    write_json(wrong / "export.json", {**manifest, "inputs": ["input_ids", "pixels"]})
    with pytest.raises(BadInputError, match="pixels"):
        OnnxDecoder(wrong)


def test_a_graph_that_is_no_decoder_is_refused(tmp_path):
    import onnx

    value = onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["b", "t"])
    out = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.INT64, ["b", "t"])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["input_ids"], ["logits"])], "g", [value], [out])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "model.onnx")
    with pytest.raises(BadInputError, match="not a decoder"):
        OnnxDecoder(tmp_path)


def test_no_silent_fallback_to_the_cpu(directory, monkeypatch):
    import onnxruntime

    with pytest.raises(BadInputError, match="Unknown provider 'tpu'"):
        OnnxDecoder(directory, provider="tpu")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(BadInputError, match=r"slimexport\[gpu\]"):
            OnnxDecoder(directory, provider="cuda")

    # A build that offers CUDA but opens the session on the CPU: what ONNX Runtime does when a CUDA library is missing.
    class Fallback:
        def get_providers(self):
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **kwargs: Fallback())
    with pytest.raises(BadInputError, match="took CPUExecutionProvider instead"):
        OnnxDecoder(directory, provider="cuda")


def test_missing_onnxruntime_names_the_command(directory, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BadInputError, match=r"pip install 'slimexport\[cpu\]'"):
        OnnxDecoder(directory)


def test_threads_follow_the_affinity_mask(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 6}, raising=False)
    assert default_threads() == 3
    monkeypatch.setattr(cores, "_quota", lambda: 1.5)
    assert default_threads() == 1
    with pytest.raises(BadInputError, match=r"threads must be from 1 to 1, .* not 2"):
        checked_threads(2)


def test_every_node_is_placed_and_counted(decoder):
    (placed,) = decoder.placement.items()
    assert placed[0] == "CPUExecutionProvider"
    assert placed[1]["GroupQueryAttention"] == 3
    assert placed[1]["MatMul"] == 3 * 5 + 1


def test_options_of_the_provider_reach_it(directory, monkeypatch):
    import onnxruntime

    seen, real = [], onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *args, **options: seen.append(options) or real(*args, **options)
    )
    OnnxDecoder(directory, provider_options={"device_id": "1"})
    assert seen[0]["providers"] == ["CPUExecutionProvider"]
    assert seen[0]["provider_options"] == [{"device_id": "1"}]
