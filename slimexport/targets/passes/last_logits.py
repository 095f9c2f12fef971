"""Logits of the last token alone, unless all are asked for: generating needs no others, and of a long prompt they are a
quarter of the work in a small model.

The graph gets an input `all_logits` with a default, so that callers who do not know it (onnxruntime-genai) have what
they need, and the same graph with the same weights still gives every logit, for perplexity. The last token of a
sequence is the last one that `attention_mask` does not mask, wherever the padding is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimexport.targets.passes.head import head_product

if TYPE_CHECKING:
    import onnx_ir as ir

ALL_LOGITS = "all_logits"


def select(model: ir.Model) -> str | None:
    """Logits become [b, 1, vocabulary], or [b, t, vocabulary] where `all_logits` (bool, a scalar) is true."""
    import numpy as np
    import onnx_ir as ir
    from onnx_ir import tape

    graph = model.graph
    product = head_product(graph)
    given = {value.name: value for value in graph.inputs}
    if product is None or product.inputs[0] is None:
        return "the product that gives the logits was not found"
    if not {"input_ids", "attention_mask"} <= given.keys():
        return "the graph does not take input_ids and attention_mask"
    hidden = product.inputs[0]

    wanted = ir.Value(
        name=ALL_LOGITS,
        shape=ir.Shape([]),
        type=ir.TensorType(ir.DataType.BOOL),
        const_value=ir.tensor(np.array(False), name=ALL_LOGITS),
    )
    graph.inputs.append(wanted)
    graph.register_initializer(wanted)

    made = tape.Tape()

    def constant(name: str, value: object) -> ir.Value:
        name = f"last_logits.{name}"
        if name in graph.initializers:
            return graph.initializers[name]
        new = ir.Value(name=name, const_value=ir.tensor(np.array(value, np.int64), name=name))
        graph.register_initializer(new)
        return new

    new = made.op("Shape", [given["input_ids"]], {"start": 1, "end": 2})  # [1]: tokens of this call
    ends = [made.op("Neg", [new]), constant("end", [2**62]), constant("one", [1])]
    last = made.op("ArgMax", [made.op("Slice", [given["attention_mask"], *ends])], {"axis": 1, "select_last_index": 1})
    count = made.op("Where", [wanted, made.op("Squeeze", [new]), constant("1", 1)])
    every = made.op("Range", [constant("0", 0), count, constant("1", 1)])  # [t] or [1]
    rows = made.op("Unsqueeze", [made.op("Where", [wanted, every, last]), constant("two", [2])])  # [b, t or 1, 1]
    picked = made.op("GatherND", [hidden, rows], {"batch_dims": 1})
    graph.insert_before(product, made.nodes)
    product.replace_input_with(0, picked)
    logits = next(value for value in graph.outputs if value.name == "logits")
    # What the default gives: onnxruntime-genai makes room for as many as are stated. ONNX Runtime only logs a warning
    # where all are asked for.
    logits.shape = ir.Shape(["batch_size", 1, logits.shape[2]]) if logits.shape else None
    return None
