"""Weights of 4 and 8 bits: their levels against a direct computation, and that whatever is wrong in a file is seen."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx_fixture import VOCAB, tiny_llama

from slimexport.errors import NotReproducedError
from slimexport.runtime import OnnxDecoder
from slimexport.targets import passes
from slimexport.targets.base import ExportOptions
from slimexport.targets.builders.mobius import MobiusBuilder
from slimexport.targets.quantise import (
    BLOCK,
    SCHEMES,
    Scheme,
    check_quantised,
    left_float,
    put_levels,
    quantise,
)
from slimexport.targets.quantise.levels import unpacked

RNG = np.random.default_rng(0)


def product(weight: np.ndarray, kind: str = "MatMul", bias: np.ndarray | None = None) -> onnx_ir.Model:
    """x [b, K] -> logits [b, N]; `weight` as the node reads it."""
    x = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["b", weight.shape[0 if kind == "MatMul" else 1]])
    given = [onnx_ir.val("w", const_value=onnx_ir.tensor(weight, name="w"))]
    if bias is not None:
        given.append(onnx_ir.val("bias", const_value=onnx_ir.tensor(bias, name="bias")))
    nodes = []
    if kind == "turned":
        nodes = [onnx_ir.node("Transpose", [given[0]], {"perm": [1, 0]})]
        nodes.append(onnx_ir.node("MatMul", [x, nodes[0].outputs[0]]))
    elif kind == "FusedMatMul":
        nodes = [onnx_ir.node(kind, [x, *given], {"transB": 1, "alpha": 1.0}, domain="com.microsoft")]
    elif kind == "Gemm":
        nodes = [onnx_ir.node("Gemm", [x, *given], {"transB": 1})]
    else:
        nodes = [onnx_ir.node("MatMul", [x, *given])]
    logits = nodes[-1].outputs[0]
    logits.name, logits.type = "logits", onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph = onnx_ir.Graph(
        [x], [logits], nodes=nodes, initializers=given, opset_imports={"": 21, "com.microsoft": 1}, name="product"
    )
    return onnx_ir.Model(graph, ir_version=10)


def run(model: onnx_ir.Model, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    found: np.ndarray = onnxruntime.InferenceSession(
        onnx_ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    ).run(None, {"x": x})[0]
    return found


def nearest(weight: np.ndarray, bits: int) -> np.ndarray:
    """[N, K]: every weight's level, by the definition: one block of one output after the other, in float64."""
    found = np.empty(weight.shape)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], BLOCK):
            block = weight[row, start : start + BLOCK].astype(np.float64)
            low, high = min(block.min(), 0), max(block.max(), 0)
            scale = (high - low) / (2**bits - 1) or 1.0
            zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
            found[row, start : start + BLOCK] = (np.clip(np.round(block / scale + zero), 0, 2**bits - 1) - zero) * scale
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [64, 80], ids=["whole blocks", "half a block"])
def test_levels_are_the_nearest_ones(bits: int, inputs: int) -> None:
    weight = RNG.normal(size=(24, inputs)).astype(np.float32)
    weight[3, :32] = 0  # a block of nothing
    weight[5] = abs(weight[5])  # zero is a level all the same
    model = product(weight.T.copy())
    plain = model.clone()
    quantise(model, Scheme(bits, bits))
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]
    put_levels(plain, model)
    found = run(plain, np.eye(inputs, dtype=np.float32)).T
    level = (weight.max() - weight.min()) / (2**bits - 1)
    assert np.abs(found - nearest(weight, bits)).max() < 1e-4 * level
    assert np.abs(found[3, :32]).max() == 0


@pytest.mark.parametrize(
    ("kind", "bias"),
    [("MatMul", False), ("turned", False), ("Gemm", False), ("Gemm", True), ("FusedMatMul", False)],
)
def test_products_of_all_forms(kind: str, bias: bool) -> None:
    weight = RNG.normal(size=(24, 96)).astype(np.float32)
    added = RNG.normal(size=24).astype(np.float32) if bias else None
    stored = weight.T.copy() if kind == "MatMul" else weight
    model = product(stored, kind, added)
    x = RNG.normal(size=(5, 96)).astype(np.float32)
    expected = run(model, x)
    plain = model.clone()
    quantise(model, Scheme(8, 8))
    assert "MatMulNBits" in [node.op_type for node in model.graph]
    assert "w" not in model.graph.initializers
    got = run(model, x)
    assert np.abs(got - expected).max() < 0.03 * np.abs(expected).max()
    put_levels(plain, model)
    assert "w" not in plain.graph.initializers
    assert np.abs(run(plain, x) - expected).max() > 0
    assert np.abs(run(plain, x) - got).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize("precision", SCHEMES)
def test_scales_of_sixteen_bits_pass_and_wrong_ones_do_not(precision: str, tmp_path: Path) -> None:
    weight = RNG.normal(size=(96, 24)).astype(np.float16)
    model = product(weight)
    sources = quantise(model, SCHEMES[precision])
    check_quantised(save(model, tmp_path / "right"), sources)
    scales = next(v for name, v in model.graph.initializers.items() if name.endswith(".scales"))
    changed = scales.const_value.numpy().copy()
    changed[3, 1] *= np.float16(1.1)
    scales.const_value = onnx_ir.tensor(changed, name=scales.name)
    with pytest.raises(NotReproducedError, match="is off by"):
        check_quantised(save(model, tmp_path / "wrong"), sources)


def test_what_is_no_plain_product_stays_and_is_counted() -> None:
    model = product(RNG.normal(size=(96, 64)).astype(np.float32))
    assert left_float(model) == 96 * 64 * 4
    node = model.graph.node(0)
    node.op_type = "Other"
    assert not quantise(model, SCHEMES["int8"])
    assert left_float(model) == 96 * 64 * 4
    node.op_type = "MatMul"
    model.graph.initializers["w"].const_value = onnx_ir.tensor(np.zeros((3, 96, 64), np.float32), name="w")
    assert not quantise(model, SCHEMES["int8"]), "three matrices in one are not cut into blocks"
    model.graph.initializers["w"].const_value = onnx_ir.tensor(np.zeros((96, 64), np.float32), name="w")
    quantise(model, SCHEMES["int8"])
    assert left_float(model) == 0
    wide = product(RNG.normal(size=(32 * 40, 64)).astype(np.float32))
    quantise(wide, SCHEMES["int8"])
    assert left_float(wide) == 0, "its scales are a matrix too, and no weights"


def test_four_bits_are_unpacked_low_first() -> None:
    assert unpacked(np.array([[0x21, 0xF3]], np.uint8), 4).tolist() == [[1, 2, 3, 15]]
    assert unpacked(np.array([[0x21]], np.uint8), 8).tolist() == [[0x21]]


# ------------------------------------------------------------------------------------------------- a whole decoder


def decoder_model(tied: bool = False) -> Any:
    made = tiny_llama(scale=3.0)
    if tied:
        made.config.tie_word_embeddings = True
        made.lm_head.weight = made.model.embed_tokens.weight
    model = MobiusBuilder().build(made, ExportOptions()).model
    passes.apply(model)
    return model


def save(model: Any, place: Path) -> Path:
    place.mkdir(exist_ok=True)
    onnx_ir.save(model, str(place / "model.onnx"), external_data="model.onnx.data")
    return place / "model.onnx"


@pytest.mark.parametrize("precision", SCHEMES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_matrix_of_a_decoder_is_taken(precision: str, tied: bool, tmp_path: Path) -> None:
    model = decoder_model(tied)
    floats = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    plain = model.clone()
    sources = quantise(model, SCHEMES[precision])
    left = Counter(node.op_type for node in model.graph)
    assert left["MatMul"] == left["Gemm"] == left["Transpose"] == 0
    assert left["MatMulNBits"] == 3 * 4 + 1
    # The hidden size is 48, not whole blocks: a tied embedding stays float then, and is stored twice.
    assert left["GatherBlockQuantized"] == 0
    path = save(model, tmp_path / "graph")
    check_quantised(path, sources)
    assert (tmp_path / "graph" / "model.onnx.data").stat().st_size < 0.7 * floats
    ids = np.random.default_rng(1).integers(0, VOCAB, (1, 12))
    got, _ = OnnxDecoder(path.parent, threads=1).forward(ids)
    put_levels(plain, model)
    expected, _ = OnnxDecoder(save(plain, tmp_path / "reference").parent, threads=1).forward(ids)
    assert 0 < np.abs(got - expected).mean() < 0.05 * expected.std()


def test_a_tied_embedding_is_stored_once() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, max_position_embeddings=32,
    )  # fmt: skip
    model = MobiusBuilder().build(LlamaForCausalLM(config).eval(), ExportOptions()).model
    plain = model.clone()
    quantise(model, SCHEMES["int4-mixed"])
    put_levels(plain, model)
    assert plain.graph.node(0).inputs[0].name == "model.embed_tokens.weight.levels.rows"
    codes = [v for v in model.graph.initializers.values() if v.name.endswith(".codes") and VOCAB in v.const_value.shape]
    assert [value.const_value.nbytes for value in codes] == [VOCAB * 64]  # 8 bits, once
    assert not [v for v in model.graph.initializers.values() if v.const_value.nbytes >= VOCAB * 64 * 4]
    assert Counter(node.op_type for node in model.graph)["GatherBlockQuantized"] == 1


@pytest.mark.parametrize("part", ["codes", "scales", "zero_points"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_one_wrong_number_in_the_file_is_seen(part: str, precision: str, tmp_path: Path) -> None:
    model = decoder_model()
    sources = quantise(model, SCHEMES[precision])
    name = next(name for name in model.graph.initializers if "layers.1" in name and name.endswith(f".{part}"))
    value = model.graph.initializers[name]
    wrong = value.const_value.numpy().copy()
    flat = wrong.reshape(-1)
    flat[7] = flat[7] * 1.1 if part == "scales" else flat[7] ^ (4 if part == "zero_points" else 2)
    value.const_value = onnx_ir.tensor(wrong, name=name)
    path = save(model, tmp_path / "graph")
    with pytest.raises(NotReproducedError, match=r"layers\.1.* is off by .* levels"):
        check_quantised(path, sources)


def test_two_weights_that_changed_places_and_missing_ones_are_seen(tmp_path: Path) -> None:
    model = decoder_model()
    sources = dict(quantise(model, SCHEMES["int8"]))
    path = save(model, tmp_path / "graph")
    names = [name for name in sources if "down_proj" in name]
    swapped = sources | {names[0]: sources[names[1]], names[1]: sources[names[0]]}
    with pytest.raises(NotReproducedError, match="is off by"):
        check_quantised(path, swapped)
    with pytest.raises(NotReproducedError, match="made from no weight"):
        check_quantised(path, {name: source for name, source in sources.items() if name != names[0]})
    with pytest.raises(NotReproducedError, match="is not in the graph"):
        check_quantised(path, sources | {"another": sources[names[0]]})
