"""What quantising does to a graph: other operators in the place of products and of the embedding's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slimexport.targets.passes.head import head_product, is_product, is_transposed, weight_of
from slimexport.targets.quantise.gptq import repaired
from slimexport.targets.quantise.levels import BLOCK, Floats, Levels, nearest

if TYPE_CHECKING:
    import onnx_ir as ir

_DOMAIN = "com.microsoft"
QUANTISED = ("MatMulNBits", "GatherBlockQuantized")
_OF_ROWS = ("Gather", "GroupQueryAttention", "RotaryEmbedding")  # read but rows of a table
_PARTS = ("codes", "scales", "zero_points")
_FULL_ACTIVATIONS, _INT8_ACTIVATIONS = 1, 4  # values of `accuracy_level`


@dataclass(frozen=True)
class Scheme:
    """`bits` of the blocks' products, `head_bits` of the embedding and of the product that gives the logits."""

    bits: int
    head_bits: int


SCHEMES = {"int8": Scheme(8, 8), "int4": Scheme(4, 4), "int4-mixed": Scheme(4, 8)}

Moments = Mapping[str, NDArray[np.float64]]
"""Name of what a product multiplies with its weights -> X^T X [K, K] of its rows on a text."""


@dataclass(frozen=True)
class Source:
    """What the levels [outputs, inputs] of a weight are the nearest ones of; `cut`: but for what lies beyond the last
    level, on purpose."""

    weight: Floats
    cut: bool = False


Sources = Mapping[str, Source]
"""By the name of the codes."""


def quantise(model: ir.Model, scheme: Scheme, moments: Moments | None = None) -> Sources:
    """Changes `model` in place: all products with weights [K, N], and the embedding where K is a multiple of BLOCK.

    With the `moments` of their inputs (`inputs_to_measure`) weights are rounded by what they do there (gptq.py).
    Weights of other operators (experts in one tensor, norms) stay as they are.
    """
    graph = model.graph
    head = head_product(graph)
    made: dict[tuple[str, bool], _Quantised] = {}
    sources: dict[str, Source] = {}

    def quantised(weight: ir.Value, transposed: bool, bits: int, read_with: str = "") -> _Quantised:
        """Of the weight [K, N], or [N, K] where it is `transposed`; the same for all who read it alike."""
        key = (str(weight.name), transposed)
        if key not in made:
            of = Source(array(weight) if transposed else array(weight).T)  # a view: no memory
            H = (moments or {}).get(read_with)
            if H is None:
                levels = nearest(of.weight, bits)
            else:
                levels, target = repaired(of.weight, H, bits)
                of = Source(target, cut=target is not of.weight)
            made[key] = _Quantised.of(graph, str(weight.name), levels, of.weight.shape)
            sources[str(made[key].codes.name)] = of
        return made[key]

    for node in [node for node in graph if is_product(node)]:
        weight = weight_of(node)
        assert weight is not None
        bits = scheme.head_bits if node is head else scheme.bits
        _replace_product(graph, node, quantised(weight, is_transposed(node), bits, str(_multiplied(node).name)))
    for node in [node for node in graph if node.op_type == "Gather" and _is_embedding(node)]:
        table = node.inputs[0]
        assert table is not None
        if array(table).shape[1] % BLOCK == 0:
            _replace_gather(graph, node, quantised(table, True, scheme.head_bits))
    _drop_unused(graph)
    model.opset_imports.setdefault(_DOMAIN, 1)
    return sources


def inputs_to_measure(model: ir.Model) -> dict[str, int]:
    """What the products of `model` multiply with their weights, and its width K: what `Moments` are of."""
    found = {}
    for node in [node for node in model.graph if is_product(node)]:
        weight = weight_of(node)
        assert weight is not None
        found[str(_multiplied(node).name)] = array(weight).shape[1 if is_transposed(node) else 0]
    return found


def _multiplied(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


@dataclass(frozen=True)
class _Quantised:
    """`Levels` of a weight of `shape` [N, K] in a graph."""

    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value
    shape: tuple[int, ...]
    bits: int

    @classmethod
    def of(cls, graph: ir.Graph, name: str, levels: Levels, shape: tuple[int, ...]) -> _Quantised:
        codes, scales, zero_points = (_initializer(graph, f"{name}.{part}", getattr(levels, part)) for part in _PARTS)
        return cls(codes, scales, zero_points, shape, levels.bits)

    @property
    def attributes(self) -> dict[str, int]:
        return {"bits": self.bits, "block_size": BLOCK}


def _replace_product(graph: ir.Graph, node: ir.Node, weight: _Quantised) -> None:
    import onnx_ir as ir

    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    outputs, width = weight.shape
    sizes = {"K": width, "N": outputs, "accuracy_level": _INT8_ACTIVATIONS}
    inputs = [node.inputs[0], weight.codes, weight.scales, weight.zero_points, *([None, bias] if bias else [])]
    new = ir.node("MatMulNBits", inputs, {**sizes, **weight.attributes}, domain=_DOMAIN, name=node.name)
    _take_place(graph, node, new)


def _replace_gather(graph: ir.Graph, node: ir.Node, weight: _Quantised) -> None:
    """The operator wants the codes as a matrix [N, K * bits / 8]."""
    import onnx_ir as ir

    shape = _initializer(graph, f"{weight.codes.name}.matrix", np.array([weight.shape[0], -1], np.int64))
    matrix = ir.node("Reshape", [weight.codes, shape])
    graph.insert_before(node, matrix)
    axes = {"gather_axis": 0, "quantize_axis": 1}
    inputs = [matrix.outputs[0], node.inputs[1], weight.scales, weight.zero_points]
    new = ir.node("GatherBlockQuantized", inputs, {**axes, **weight.attributes}, domain=_DOMAIN, name=node.name)
    _take_place(graph, node, new)


def _take_place(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    import onnx_ir as ir

    graph.insert_before(old, new)
    given, made = old.outputs[0], new.outputs[0]
    made.type, made.shape = given.type, given.shape
    name = given.name
    ir.convenience.replace_all_uses_with(given, made, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    made.name = name


def left_float(model: ir.Model) -> int:
    """Bytes of the matrices in a quantised `model` that are still float: of operators that have no quantised kind here
    (experts in one tensor), and of products that are no plain ones."""
    total = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        read = any(use.node.op_type not in (*QUANTISED, *_OF_ROWS) for use in value.uses())
        if tensor is not None and read and tensor.dtype.is_floating_point() and _matrix(tensor.shape.numpy()):
            total += tensor.nbytes
    return total


def _matrix(shape: Sequence[int]) -> bool:
    """Whether it has what a block is cut from; tables of positions and convolutions are small, or no matrices."""
    return len(shape) >= 2 and shape[-1] >= BLOCK and shape[-2] >= BLOCK


def _drop_unused(graph: ir.Graph) -> None:
    """Weights that nothing reads any more, also through a node that only changes their shape."""
    for node in list(graph):
        read = any(output.uses() or output.is_graph_output() for output in node.outputs)
        if node.op_type in ("Transpose", "Reshape") and not read:
            graph.remove(node, safe=True)
    for value in list(graph.initializers.values()):
        if not value.uses() and not value.is_graph_input() and not value.is_graph_output():
            del graph.initializers[str(value.name)]


def _initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    import onnx_ir as ir

    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def array(weight: ir.Value) -> NDArray[Any]:
    assert weight.const_value is not None
    return weight.const_value.numpy()


def _is_embedding(node: ir.Node) -> bool:
    """Whether it takes rows of a matrix of weights by token."""
    table, rows = node.inputs[:2]
    if table is None or rows is None or not table.is_initializer() or table.const_value is None:
        return False
    axis = node.attributes.get_int("axis", 0)
    return axis == 0 and len(table.const_value.shape) == 2 and rows.name == "input_ids"


def without_rounded_activations(model: ir.Model) -> None:
    """Changes a quantised `model` in place: the same weights, activations in full precision. Many times slower."""
    import onnx_ir as ir

    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _FULL_ACTIVATIONS)


def put_levels(plain: ir.Model, quantised: ir.Model) -> None:
    """Changes `plain`, what `quantised` was made from: each weight becomes the numbers that its levels stand for.

    What it computes is what the quantised graph would with activations that are not rounded, and by other operators.
    """
    known = quantised.graph.initializers
    gathered = {codes.name for node in quantised.graph if node.op_type == "GatherBlockQuantized"
                for codes in stored(node)[:1]}  # fmt: skip
    made: dict[str, ir.Value] = {}

    def numbers_of(weight: ir.Value, turned: bool) -> ir.Value | None:
        """[K, N], or [N, K] where not `turned`; None for a weight that was left alone."""
        if f"{weight.name}.codes" not in known:
            return None
        name = f"{weight.name}.levels{'' if turned else '.rows'}"
        if name not in made:
            levels = Levels(*(array(known[f"{weight.name}.{part}"]) for part in _PARTS))
            source = array(weight)
            numbers = levels.numbers()[:, : source.size // len(levels.codes)].astype(source.dtype)
            made[name] = _initializer(plain.graph, name, np.ascontiguousarray(numbers.T) if turned else numbers)
        return made[name]

    for node in [node for node in plain.graph if is_product(node)]:
        weight = weight_of(node)
        assert weight is not None
        if (new := numbers_of(weight, turned=not node.attributes.get_int("transB", 0))) is not None:
            node.replace_input_with(1, new)
    for node in [node for node in plain.graph if node.op_type == "Gather" and _is_embedding(node)]:
        table = node.inputs[0]
        assert table is not None
        if f"{table.name}.codes" in gathered and (new := numbers_of(table, turned=False)) is not None:
            node.replace_input_with(0, new)
    _drop_unused(plain.graph)


def stored(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    gathers = node.op_type == "GatherBlockQuantized"
    codes, scales, zero_points = (node.inputs[place] for place in ((0, 2, 3) if gathers else (1, 2, 3)))
    if gathers and codes is not None and (reshape := codes.producer()) is not None:
        codes = reshape.inputs[0]
    assert codes is not None
    assert scales is not None
    assert zero_points is not None
    return codes, scales, zero_points
