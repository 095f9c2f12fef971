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
    """Whether it multiplies what it is given with a weight."""
    return node.op_type in ("MatMul", "Gemm") and weight_of(node) is not None


def weight_of(node: ir.Node) -> ir.Value | None:
    """The weight that a matrix product reads, as it is or transposed."""
    second = node.inputs[1]
    if second is not None and (above := second.producer()) is not None and above.op_type == "Transpose":
        second = above.inputs[0]
    return second if second is not None and second.is_initializer() else None


def is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return value.is_initializer() or (producer is not None and producer.op_type == "Constant")
