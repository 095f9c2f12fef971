"""Weight-only quantisation of a graph: products become MatMulNBits, the embedding's rows GatherBlockQuantized.

Weights are rounded to the nearest of 2^bits levels between the smallest and largest (zero among them) of every `BLOCK`
inputs of an output. Activations stay in the graph's own precision; the kernels take them in 8 bits (`accuracy_level`
4), without which 8-bit weights decode many times slower. A tied embedding is stored once, for both uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slimexport.errors import NotReproducedError
from slimexport.targets.passes.head import head_product, is_product, is_transposed, weight_of

if TYPE_CHECKING:
    import onnx_ir as ir

BLOCK = 32
_DOMAIN = "com.microsoft"
_QUANTISED = ("MatMulNBits", "GatherBlockQuantized")
_OF_ROWS = ("Gather", "GroupQueryAttention", "RotaryEmbedding")  # read but rows of a table
_FULL_ACTIVATIONS, _INT8_ACTIVATIONS = 1, 4  # values of `accuracy_level`
_ROUNDING = 1e-4  # of a level: in float32 a weight half way between two may go to either


@dataclass(frozen=True)
class Scheme:
    """`bits` of the blocks' products, `head_bits` of the embedding and of the product that gives the logits."""

    bits: int
    head_bits: int


SCHEMES = {"int8": Scheme(8, 8), "int4": Scheme(4, 4), "int4-mixed": Scheme(4, 8)}

Sources = Mapping[str, NDArray[np.floating[Any]]]
"""Name of a quantised weight -> what it was made from, [outputs, inputs]."""


def quantise(model: ir.Model, scheme: Scheme) -> Sources:
    """Changes `model` in place: all products with weights [K, N], and the embedding where K is a multiple of BLOCK.

    Weights of other operators (experts in one tensor, norms) stay as they are.
    """
    graph = model.graph
    head = head_product(graph)
    made: dict[tuple[str, bool], _Quantised] = {}
    sources: dict[str, NDArray[np.floating[Any]]] = {}

    def quantised(weight: ir.Value, transposed: bool, bits: int) -> _Quantised:
        """Of the weight [K, N], or [N, K] where it is `transposed`; the same for all who read it alike."""
        key = (str(weight.name), transposed)
        if key not in made:
            source = _array(weight) if transposed else _array(weight).T
            made[key] = _Quantised.of(graph, str(weight.name), source, bits)
            sources[str(made[key].codes.name)] = source  # a view: no memory
        return made[key]

    for node in [node for node in graph if is_product(node)]:
        weight = weight_of(node)
        assert weight is not None
        bits = scheme.head_bits if node is head else scheme.bits
        _replace_product(graph, node, quantised(weight, is_transposed(node), bits))
    for node in [node for node in graph if node.op_type == "Gather" and _is_embedding(node)]:
        table = node.inputs[0]
        assert table is not None
        if _array(table).shape[1] % BLOCK == 0:
            _replace_gather(graph, node, quantised(table, True, scheme.head_bits))
    _drop_unused(graph)
    model.opset_imports.setdefault(_DOMAIN, 1)
    return sources


@dataclass(frozen=True)
class _Quantised:
    """A weight [N, K] as the operators read it: codes uint8 [N, K / BLOCK, BLOCK * bits / 8], scales [N, K / BLOCK],
    zero points uint8, packed like the codes."""

    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value
    shape: tuple[int, int]
    bits: int

    @classmethod
    def of(cls, graph: ir.Graph, name: str, source: NDArray[np.floating[Any]], bits: int) -> _Quantised:
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )

        config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, bits=bits)
        arrays = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(source.T))
        parts = zip(("codes", "scales", "zero_points"), arrays, strict=True)
        codes, scales, zero_points = (_initializer(graph, f"{name}.{part}", array) for part, array in parts)
        return cls(codes, scales, zero_points, (source.shape[0], source.shape[1]), bits)

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
        read = any(use.node.op_type not in (*_QUANTISED, *_OF_ROWS) for use in value.uses())
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


def _array(weight: ir.Value) -> NDArray[Any]:
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
                for codes in _stored(node)[:1]}  # fmt: skip
    made: dict[str, ir.Value] = {}

    def levels(weight: ir.Value, turned: bool) -> ir.Value | None:
        """[K, N], or [N, K] where not `turned`; None for a weight that was left alone."""
        if f"{weight.name}.codes" not in known:
            return None
        name = f"{weight.name}.levels{'' if turned else '.rows'}"
        if name not in made:
            parts = [_array(known[f"{weight.name}.{part}"]) for part in ("codes", "scales", "zero_points")]
            source = _array(weight)
            array = _levels(*parts)[:, : source.size // len(parts[0])].astype(source.dtype)
            made[name] = _initializer(plain.graph, name, np.ascontiguousarray(array.T) if turned else array)
        return made[name]

    for node in [node for node in plain.graph if is_product(node)]:
        weight = weight_of(node)
        assert weight is not None
        if (new := levels(weight, turned=not node.attributes.get_int("transB", 0))) is not None:
            node.replace_input_with(1, new)
    for node in [node for node in plain.graph if node.op_type == "Gather" and _is_embedding(node)]:
        table = node.inputs[0]
        assert table is not None
        if f"{table.name}.codes" in gathered and (new := levels(table, turned=False)) is not None:
            node.replace_input_with(0, new)
    _drop_unused(plain.graph)


def _levels(codes: NDArray[np.uint8], scales: NDArray[Any], zero_points: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[N, K] (K in whole blocks): the numbers that the codes stand for."""
    outputs, blocks = scales.shape
    bits = codes.shape[-1] * 8 // BLOCK
    zero = unpacked(zero_points.reshape(outputs, -1), bits)[:, :blocks, None].astype(np.float64)
    found = (unpacked(codes.reshape(outputs, -1), bits).reshape(outputs, blocks, BLOCK) - zero) * scales[..., None]
    return np.asarray(found, np.float64).reshape(outputs, -1)


# -------------------------------------------------------------------------------------------------------- checking


def check_quantised(path: Path, sources: Sources) -> None:
    """Holds every quantised weight of the graph in `path`, as its file has it, against what it was made from.

    The level that stands for a weight must be the nearest one there is: within half a level, or the first or the last.
    One wrong scale, zero point or code is seen, where logits would not show it. Raises NotReproducedError.
    """
    import onnx_ir as ir

    graph = ir.load(str(path)).graph
    found = set()
    for node in graph:
        if node.op_type not in _QUANTISED:
            continue
        codes, scales, zero_points = _stored(node)
        name = str(codes.name)
        found.add(name)
        source = sources.get(name)
        if source is None:
            raise NotReproducedError(f"{path}: {name} was made from no weight of the model.")
        bits = node.attributes.get_int("bits", 4)
        if worst := _beyond_nearest(source, _array(codes), _array(scales), _array(zero_points), bits):
            raise NotReproducedError(f"{path}: {name} is off by {worst:.3g} levels somewhere, half a one is the most.")
    if missing := set(sources) - found:
        raise NotReproducedError(f"{path}: {min(missing)} is not in the graph.")


def _stored(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    gathers = node.op_type == "GatherBlockQuantized"
    codes, scales, zero_points = (node.inputs[place] for place in ((0, 2, 3) if gathers else (1, 2, 3)))
    if gathers and codes is not None and (reshape := codes.producer()) is not None:
        codes = reshape.inputs[0]
    assert codes is not None
    assert scales is not None
    assert zero_points is not None
    return codes, scales, zero_points


def _beyond_nearest(
    source: NDArray[Any], codes: NDArray[np.uint8], scales: NDArray[Any], zero_points: NDArray[np.uint8], bits: int
) -> float:
    """By how many levels a weight of `source` [N, K] is farther from its level than it need be; 0 where none is."""
    outputs, inputs = source.shape
    levels = unpacked(codes.reshape(outputs, -1), bits)[:, :inputs].astype(np.float64)
    blocks = -(-inputs // BLOCK)
    scale = np.repeat(scales.reshape(outputs, blocks).astype(np.float64), BLOCK, axis=1)[:, :inputs]
    zero = np.repeat(unpacked(zero_points.reshape(outputs, -1), bits)[:, :blocks], BLOCK, axis=1)[:, :inputs]
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.where(scale == 0, np.where(source == 0, zero, np.inf), source / scale + zero)
    distance = np.abs(np.clip(wanted, 0, 2**bits - 1) - levels)
    beyond = np.nan_to_num(wanted, nan=np.inf) - np.clip(wanted, 0, 2**bits - 1)  # a range that is too small
    worst = float(max(distance.max(), np.abs(beyond).max()))
    # A scale of 16 bits is itself rounded, by which the last level of all is off most.
    rounding = _ROUNDING + float(np.finfo(scales.dtype).eps) / 2
    return worst if not worst <= 0.5 + rounding * 2**bits else 0.0


def unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """uint8 [n, m] of two 4-bit numbers each, the lower first -> uint8 [n, 2 m]; 8-bit ones as they are."""
    if bits == 8:
        return packed
    return np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(len(packed), -1)
