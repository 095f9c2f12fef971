"""The fallback builder: transformers traces the model itself, so whatever transformers can trace can be exported.

It takes minutes where mobius takes seconds. The batch stays dynamic, at the price of GroupQueryAttention, which the
exporter's fusions find in graphs of batch 1 only; in return the graph is right with left padding.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.targets.base import BuilderUnsupportedError, BuiltGraph, ExportOptions

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, PreTrainedModel

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class TransformersBuilder:
    """See `slimexport.targets.base.Builder`."""

    name = "transformers"

    def build(self, model: PreTrainedModel, directory: Path, options: ExportOptions) -> BuiltGraph:
        import onnx_ir

        try:
            model = _prepared(model, options)
            shapes = _cache_shapes(model)
            program = _trace(model, shapes, options)
            _rename(program.graph, shapes)
        except (BuilderUnsupportedError, MemoryError):
            raise
        except Exception as error:  # tracing runs the model's own code: anything can be raised there
            raise BuilderUnsupportedError(f"it failed with {type(error).__name__}: {_head(error)}") from error
        _forget_origin(program)
        onnx_ir.save(program, str(directory / "model.onnx"), external_data="model.onnx.data")
        return BuiltGraph(
            inputs=tuple(value.name for value in program.graph.inputs),
            outputs=tuple(value.name for value in program.graph.outputs),
            kv_heads=tuple(heads for heads, _ in shapes),
            query_heads=_query_heads(model, shapes),
            head_dim=shapes[0][1],
            left_padding=True,
            shared_kv=False,
        )


def _prepared(model: PreTrainedModel, options: ExportOptions) -> PreTrainedModel:
    """`model` on the CPU in the export's precision; a copy wherever that is a change."""
    import torch

    dtype = getattr(torch, _DTYPES[options.precision])
    if model.device.type == "cpu" and model.dtype == dtype:
        return model
    return copy.deepcopy(model).to(device="cpu", dtype=dtype)


def _cache_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(KV heads, head_dim) of every block, from the cache that one token leaves behind."""
    import torch

    with torch.no_grad():
        output = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", None) or []
    keys = [getattr(layer, "keys", None) for layer in layers]
    shapes = [(key.shape[1], key.shape[3]) for key in keys if key is not None and key.dim() == 4]
    if not shapes or len(shapes) != len(keys):
        raise BuilderUnsupportedError("its cache does not hold one key and one value tensor per block.")
    return shapes


def _sample(shapes: list[tuple[int, int]], dtype: torch.dtype) -> dict[str, Any]:
    """Inputs to trace with: every size that stays dynamic is above 1, and one row is really padded.

    torch.export would otherwise take a size of 1, or a mask that masks nothing, for a constant.
    """
    import torch
    from transformers import DynamicCache

    batch, past, tokens = 2, 5, 3
    cache: DynamicCache = DynamicCache()
    for block, (heads, dim) in enumerate(shapes):
        key = torch.zeros(batch, heads, past, dim, dtype=dtype)
        cache.update(key, key.clone(), block)
    mask = torch.ones(batch, past + tokens, dtype=torch.int64)
    mask[0, :2] = 0
    return {
        "input_ids": torch.zeros(batch, tokens, dtype=torch.int64),
        "attention_mask": mask,
        "position_ids": torch.arange(past, past + tokens).expand(batch, tokens).clone(),
        "past_key_values": cache,
        "use_cache": True,
    }


def _trace(model: PreTrainedModel, shapes: list[tuple[int, int]], options: ExportOptions) -> Any:
    """The onnx_ir Model, fused for the provider."""
    import torch
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    auto = torch.export.Dim.AUTO
    dynamic: dict[str, Any] = {name: {0: auto, 1: auto} for name in ("input_ids", "attention_mask", "position_ids")}
    dynamic["past_key_values"] = [{0: auto, 2: auto} for _ in range(2 * len(shapes))]
    config = OnnxConfig(dynamic=True, dynamic_shapes=dynamic, ort_fusions=options.provider)
    return OnnxExporter().export(model, _sample(shapes, model.dtype), config=config).program


def _contract_name(theirs: str, plain: Sequence[str], prefix: str) -> str:
    """What the contract calls an input or output: what stands before `layers.N.keys` has changed from one release of
    transformers to the next (`input.past_key_values.` in 5.23, `past_key_values.` and `cache.` in 5.24)."""
    found = re.fullmatch(r"(?:\w+\.)*layers\.(\d+)\.(key|value)s", theirs)
    if theirs in plain or found is None:
        return theirs
    return f"{prefix}.{found[1]}.{found[2]}"


def _rename(graph: Any, shapes: list[tuple[int, int]]) -> None:
    """Gives inputs and outputs the names and dimension names of the contract (targets/base.py)."""
    import onnx_ir as ir

    pairs = [(block, part) for block in range(len(shapes)) for part in ("key", "value")]
    for values, plain, prefix in (
        (graph.inputs, ("input_ids", "attention_mask", "position_ids"), "past_key_values"),
        (graph.outputs, ("logits",), "present"),
    ):
        ours = [_contract_name(value.name, plain, prefix) for value in values]
        if sorted(ours) != sorted([*plain, *(f"{prefix}.{block}.{part}" for block, part in pairs)]):
            raise BuilderUnsupportedError(f"its graph has the inputs or outputs {[value.name for value in values]}.")
        for value, name in zip(values, ours, strict=True):
            value.name = name

    batch, tokens, past, total = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
    dims: dict[str, list[Any]] = {
        "input_ids": [batch, tokens],
        "attention_mask": [batch, total],
        "position_ids": [batch, tokens],
    }
    for block, part in pairs:
        heads, dim = shapes[block]
        dims[f"past_key_values.{block}.{part}"] = [batch, heads, past, dim]
        dims[f"present.{block}.{part}"] = [batch, heads, total, dim]
    for value in (*graph.inputs, *graph.outputs):
        wanted = dims.get(value.name) or [batch, tokens, value.shape[2]]
        fixed = [(index, dim) for index, dim in enumerate(value.shape) if isinstance(dim, int)]
        if any(wanted[index] != dim for index, dim in fixed):
            raise BuilderUnsupportedError(f"{value.name} came out with the fixed shape {value.shape}.")
        value.shape = ir.Shape(wanted)


def _forget_origin(program: Any) -> None:
    """Drops the stack traces (with this machine's paths) that the tracer attaches to every node."""
    program.metadata_props.clear()
    program.doc_string = None
    for graph in program.graphs():
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()


def _query_heads(model: PreTrainedModel, shapes: list[tuple[int, int]]) -> int:
    """The largest count of query heads, where the blocks show it; else the KV heads' (it is informative only)."""
    from slimexport.targets.builders.sizes import architecture

    try:
        return max(block.query_heads for block in architecture(model).blocks)
    except BuilderUnsupportedError:
        return max(heads for heads, _ in shapes)


def _head(error: Exception) -> str:
    """The first line: torch.export's errors come with pages of advice."""
    return (str(error).strip().splitlines() or [""])[0][:300]
