"""A graph that is wrong in one place never leaves the export: each way to be wrong, in full and in few bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
from export_fixture import tiny, tokenizer

from slimexport.artifacts import ExportArtifact
from slimexport.errors import NotReproducedError
from slimexport.runtime import OnnxDecoder
from slimexport.targets import onnx as onnx_target
from slimexport.targets import registry
from slimexport.targets.base import ExportOptions
from slimexport.verification.numerics import check_export

PRECISIONS = ("fp32", "int8", "int4")
Mutation = Callable[[Any], None]


def export(directory: Path, precision: str) -> ExportArtifact:
    model = tiny("llama", "per_layer")

    def check(artifact: ExportArtifact, reference: ExportArtifact | None = None) -> None:
        against = OnnxDecoder(Path(reference.path), threads=1) if reference else model
        check_export(OnnxDecoder(Path(artifact.path), threads=1), against, steps=16)

    options = ExportOptions(builder="mobius", precision=precision)
    return registry.get("onnx").export(model, tokenizer(), directory, options, check)


def initializer(graph: Any, *parts: str) -> Any:
    return next(value for name, value in graph.initializers.items() if all(part in name for part in parts))


def changed(value: Any, change: Callable[[np.ndarray], np.ndarray]) -> None:
    value.const_value = onnx_ir.tensor(change(value.const_value.numpy()), name=value.name)


def another_weight(graph: Any) -> None:
    """3 % on one matrix, or one level of 256 on its codes."""
    value = initializer(graph, "layers.2", "down_proj")
    few_bits = value.name.endswith(".codes")
    changed(value, lambda array: np.bitwise_xor(array, 1) if few_bits else array * np.float32(1.03))


def another_norm(graph: Any) -> None:
    changed(initializer(graph, "layers.1", "input_layernorm"), lambda array: array * np.float32(1.1))


def swapped_cache(graph: Any) -> None:
    """Key and value of one block change places on the way out."""
    key, value = (next(v for v in graph.outputs if v.name == f"present.1.{part}") for part in ("key", "value"))
    key.name, value.name = "aside", key.name
    key.name = "present.1.value"


def positions_off_by_one(graph: Any) -> None:
    """Every decode step takes its position for the one before."""
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            for place in (7, 8):  # cos and sin: row n becomes row n - 1, and the first stays
                value = node.inputs[place]
                if not value.name.endswith(".late"):
                    changed(value, lambda array: np.concatenate([array[:20], array[19:-1]]))
                    graph.initializers.pop(value.name)
                    value.name += ".late"
                    graph.register_initializer(value)
            return


def wrong_row(graph: Any) -> None:
    """The last token's logits are those of the token before."""
    node = next(node for node in graph if node.op_type == "ArgMax")
    one = onnx_ir.Value(name="one more", const_value=onnx_ir.tensor(np.array(1, np.int64), name="one more"))
    graph.register_initializer(one)
    zero = onnx_ir.Value(name="none", const_value=onnx_ir.tensor(np.array(0, np.int64), name="none"))
    graph.register_initializer(zero)
    readers = [(use.node, use.idx) for use in node.outputs[0].uses()]
    before = onnx_ir.node("Sub", [node.outputs[0], one])
    kept = onnx_ir.node("Max", [before.outputs[0], zero])
    graph.insert_after(node, [before, kept])
    for reader, place in readers:
        reader.replace_input_with(place, kept.outputs[0])


def wrong_scale(graph: Any) -> None:
    """Of one block of 32 weights."""
    value = initializer(graph, "layers.3", ".scales")

    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.reshape(-1)[5] *= np.float32(1.05)
        return array

    changed(value, change)


MUTATIONS: tuple[Mutation, ...] = (another_weight, another_norm, swapped_cache, positions_off_by_one, wrong_row)
CASES = [(m, p) for m in MUTATIONS for p in PRECISIONS] + [(wrong_scale, "int8"), (wrong_scale, "int4")]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_as_it_is_it_leaves(precision: str, tmp_path: Path) -> None:
    assert export(tmp_path, precision).precision == precision
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "what the checks needed is gone"


@pytest.mark.parametrize(("mutate", "precision"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_wrong_in_one_place_it_does_not(
    mutate: Mutation, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float graph in full precision; in few bits what was quantised, while the float graph was right."""
    if precision == "fp32":
        real = onnx_target.passes.apply

        def wrong(model: Any, without: Any = ()) -> Any:
            made = real(model, without)
            mutate(model.graph)
            return made

        monkeypatch.setattr(onnx_target.passes, "apply", wrong)
    else:
        quantise = onnx_target.quantise.quantise

        def wrong(model: Any, scheme: Any, moments: Any) -> Any:
            made = quantise(model, scheme, moments)
            mutate(model.graph)
            return made

        monkeypatch.setattr(onnx_target.quantise, "quantise", wrong)
    with pytest.raises(NotReproducedError) as caught:
        export(tmp_path, precision)
    assert caught.value.exit_code == 5
