"""Finds the matrix product that gives the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_AFTER = ("Add", "Cast", "Div", "Identity", "Mul", "Tanh")  # biases, scales and caps of logits


def head_product(graph: ir.Graph) -> ir.Node | None:
    """The node that multiplies the last hidden states with the vocabulary's weights, None where it is not found."""
    value = next(output for output in graph.outputs if output.name == "logits")
    while (node := value.producer()) is not None:
        if is_product(node):
            return node
        if node.op_type not in _AFTER:
            return None
        computed = [given for given in node.inputs if given is not None and given.producer() and not is_constant(given)]
        if len(computed) != 1:
            return None
        (value,) = computed
    return None


def is_product(node: ir.Node) -> bool:
    """Whether it multiplies what it is given with a matrix of weights, and does nothing else but add a bias.

    FusedMatMul is how transformers' exporter writes a product with a tied embedding.
    """
    if node.op_type not in ("MatMul", "Gemm", "FusedMatMul") or weight_of(node) is None:
        return False
    plain = ("transA", "transBatchA", "transBatchB")
    scales = ("alpha", "beta") if node.op_type == "Gemm" else ("alpha",)
    return not any(node.attributes.get_int(name, 0) for name in plain) and all(
        node.attributes.get_float(name, 1.0) == 1.0 for name in scales
    )


def weight_of(node: ir.Node) -> ir.Value | None:
    """The matrix of weights that a product reads, as it is or transposed."""
    second = node.inputs[1]
    if second is not None and (above := second.producer()) is not None and above.op_type == "Transpose":
        second = above.inputs[0]
    if second is None or not second.is_initializer() or second.const_value is None:
        return None
    return second if len(second.const_value.shape) == 2 else None


def is_transposed(node: ir.Node) -> bool:
    """Whether the weight that a product reads is [outputs, inputs]."""
    second = node.inputs[1]
    assert second is not None
    turned = second.producer() is not None
    return turned != bool(node.attributes.get_int("transB", 0))


def is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return value.is_initializer() or (producer is not None and producer.op_type == "Constant")
