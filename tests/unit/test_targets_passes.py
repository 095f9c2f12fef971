"""Passes over the graph: what they change, and that logits stay what they were."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
from onnx_fixture import VOCAB, tiny_llama

from slimexport.errors import BadInputError
from slimexport.runtime import OnnxDecoder
from slimexport.targets import passes
from slimexport.targets.base import ExportOptions
from slimexport.targets.builders.mobius import MobiusBuilder

IDS = np.random.default_rng(0).integers(0, VOCAB, (2, 11))


def built() -> Any:
    return MobiusBuilder().build(tiny_llama(), ExportOptions()).model


def decoder(model: Any, directory: Path) -> OnnxDecoder:
    directory.mkdir()
    onnx_ir.save(model, str(directory / "model.onnx"), external_data="model.onnx.data")
    return OnnxDecoder(directory, threads=1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> OnnxDecoder:
    return decoder(built(), tmp_path_factory.mktemp("plain") / "graph")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> OnnxDecoder:
    model = built()
    assert passes.apply(model) == (("gate_up", "last_logits", "unread"), ())
    return decoder(model, tmp_path_factory.mktemp("done") / "graph")


def operators(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def outputs(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph for output in node.outputs if output.name)


@pytest.mark.parametrize("name", passes.PASSES)
def test_a_pass_left_out_leaves_the_graph_alone(name: str) -> None:
    model, others = built(), tuple(other for other in passes.PASSES if other != name)
    before = outputs(model)
    assert passes.apply(model, (name, *others)) == ((), ())
    assert outputs(model) == before
    assert passes.apply(model, others) == ((name,), ())
    assert outputs(model) != before


def test_unknown_pass_is_named() -> None:
    with pytest.raises(BadInputError, match=r"'last_logit' over the graph\. Did you mean 'last_logits'"):
        passes.apply(built(), ("last_logit",))


def test_logits_are_the_same(plain: OnnxDecoder, done: OnnxDecoder) -> None:
    expected, past = plain.forward(IDS)
    got, own = done.forward(IDS)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=1e-4)
    np.testing.assert_allclose(done.forward(IDS[:, :1], own)[0], plain.forward(IDS[:, :1], past)[0], atol=1e-4)


def test_products_of_gate_and_up_become_one() -> None:
    model = built()
    products, weights = operators(model)["MatMul"], len(model.graph.initializers)
    passes.apply(model, ("last_logits",))
    assert operators(model)["MatMul"] == products - 3
    assert len(model.graph.initializers) == weights - 3  # none is kept twice


def test_outputs_that_nothing_reads_are_left_out() -> None:
    model, norm = built(), "SkipSimplifiedLayerNormalization"
    norms = operators(model)[norm]
    assert outputs(model)[norm] == 4 * norms  # mean and variance as well
    passes.apply(model, ("gate_up", "last_logits"))
    # The last norm's sum has no reader either.
    assert outputs(model)[norm] == 2 * norms - 1
    assert sorted(len(node.outputs) for node in model.graph if node.op_type == norm) == [1] + [4] * (norms - 1)
    assert all(value.name for node in model.graph for value in node.inputs if value is not None)


def test_the_last_token_is_the_last_that_is_not_masked(done: OnnxDecoder) -> None:
    mask = np.ones_like(IDS)
    mask[1, 4:] = 0
    every, _ = done.forward(IDS, None, mask)
    last, _ = done.last_logits(IDS, None, mask)
    assert last.shape == (2, VOCAB)
    np.testing.assert_allclose(last, np.stack([every[0, -1], every[1, 3]]), atol=1e-4)
    assert np.abs(last[1] - every[1, -1]).max() > 0.1


def test_the_last_token_of_a_chunk_and_of_a_decode_step(done: OnnxDecoder) -> None:
    every, _ = done.forward(IDS[:1])
    _, past = done.last_logits(IDS[:1, :5])
    chunk, past = done.last_logits(IDS[:1, 5:10], past)
    step, _ = done.last_logits(IDS[:1, 10:], past)
    np.testing.assert_allclose(np.stack([chunk[0], step[0]]), every[0, 9:], atol=1e-4)


def test_masked_tokens_on_the_left_do_not_move_it() -> None:
    """On the graph of the rows alone: the one that attends is wrong with left padding."""
    import onnxruntime

    from slimexport.targets.passes import last_logits

    value = onnx_ir.val
    ids = value("input_ids", onnx_ir.DataType.INT64, ["b", "t"])
    mask = value("attention_mask", onnx_ir.DataType.INT64, ["b", "n"])
    table = value("table", onnx_ir.DataType.FLOAT, [50, 4])
    weight = value("weight", const_value=onnx_ir.tensor(np.eye(4, dtype=np.float32), name="weight"))
    gather = onnx_ir.node("Gather", [table, ids])
    product = onnx_ir.node("MatMul", [gather.outputs[0], weight], outputs=[value("logits")])
    logits = product.outputs[0]
    logits.type, logits.shape = onnx_ir.TensorType(onnx_ir.DataType.FLOAT), onnx_ir.Shape(["b", "t", 4])
    graph = onnx_ir.Graph(
        [ids, mask, table],
        [logits],
        nodes=[gather, product],
        initializers=[weight],
        opset_imports={"": 21},
        name="rows",
    )
    model = onnx_ir.Model(graph, ir_version=10)
    assert last_logits.select(model) is None
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    rows = np.arange(200, dtype=np.float32).reshape(50, 4)
    feed = {"table": rows, "input_ids": np.array([[7, 8, 9], [4, 5, 6]]), "attention_mask": np.ones((2, 3), np.int64)}
    feed["attention_mask"][0, 0] = 0
    feed["attention_mask"][1, 1:] = 0
    assert (session.run(None, feed)[0] == rows[[[9], [4]]]).all()
    feed["attention_mask"] = np.concatenate([np.zeros((2, 5), np.int64), feed["attention_mask"]], 1)  # a masked past
    assert (session.run(None, feed)[0] == rows[[[9], [4]]]).all()
    assert (session.run(None, feed | {"all_logits": np.array(True)})[0] == rows[feed["input_ids"]]).all()


def test_a_graph_without_the_products_is_left_alone_and_says_so() -> None:
    value = onnx_ir.val
    logits = value("logits", onnx_ir.DataType.FLOAT, ["b", "t", 4])
    model = onnx_ir.Model(onnx_ir.Graph([logits], [logits], nodes=[], name="nothing"), ir_version=10)
    names, notes = passes.apply(model)
    assert names == ()
    assert notes == (
        "Pass gate_up: there are no two products of one input (the builder may have packed them).",
        "Pass last_logits: the product that gives the logits was not found.",
        "Pass unread: no operator has an output that nothing reads.",
    )
    assert [given.name for given in model.graph.inputs] == ["logits"]
