"""Outputs that nothing reads are not computed: a norm with a residual can also give its mean and its variance, for
training, and ONNX Runtime writes what has a name. Twice in every block that is 1 % of a small model's token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

# Operators of com.microsoft with outputs that may be left out, which no schema in the onnx package tells.
_OPTIONAL = {"SkipLayerNormalization": (1, 2, 3), "SkipSimplifiedLayerNormalization": (1, 2, 3)}


def drop(model: ir.Model) -> str | None:
    """Optional outputs without a reader lose their names, and their places where none follows that is read."""
    kept, dropped = set(model.graph.outputs), 0
    for node in model.graph:
        for index in _OPTIONAL.get(node.op_type, ()):
            if index < len(node.outputs):
                output = node.outputs[index]
                if output.name and output not in kept and not output.uses():
                    output.name, dropped = "", dropped + 1
        if node.op_type in _OPTIONAL:
            node.resize_outputs(max(i for i, output in enumerate(node.outputs) if output.name) + 1)
    return None if dropped else "no operator has an output that nothing reads"
