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
        new = ir.Value(name=name, const_value=ir.tensor(np.array(value, np.int64), name=name))
        graph.register_initializer(new)
        return new

    zero, one, end = constant("zero", [0]), constant("one", [1]), constant("end", [2**62])
    new = made.op("Shape", [given["input_ids"]], {"start": 1, "end": 2})  # [1]: tokens of this call
    here = made.op("Slice", [given["attention_mask"], made.op("Neg", [new]), end, one])  # [b, t]: their mask
    seen = made.op("Cast", [here], {"to": ir.DataType.INT32})
    last = made.op("ArgMax", [seen], {"axis": 1, "keepdims": 1, "select_last_index": 1})  # [b, 1]
    every = made.op("Range", [constant("0", 0), made.op("Squeeze", [new]), constant("1", 1)])  # [t]
    first = made.op("Where", [wanted, zero, constant("minus_one", [-1])])
    rows = made.op("Where", [wanted, made.op("Slice", [every, first, end]), last])  # [b, t] or [b, 1]
    picked = made.op("GatherND", [hidden, made.op("Unsqueeze", [rows, constant("two", [2])])], {"batch_dims": 1})
    graph.insert_before(product, made.nodes)
    product.replace_input_with(0, picked)
    logits = next(value for value in graph.outputs if value.name == "logits")
    # What the default gives: onnxruntime-genai makes room for as many as are stated. ONNX Runtime only logs a warning
    # where all are asked for.
    logits.shape = ir.Shape(["batch_size", 1, logits.shape[2]]) if logits.shape else None
    return None
