"""The fallback builder: transformers traces the model itself, so whatever transformers can trace can be exported.

It takes minutes where mobius takes seconds. The batch stays dynamic, at the price of GroupQueryAttention, which the
exporter's fusions find in graphs of batch 1 only; in return the graph is right with left padding.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slimexport.architectures.cache import cache_argument, cache_of
from slimexport.precisions import cast_parameters
from slimexport.providers import PROVIDERS
from slimexport.runtime.base import DTYPES
from slimexport.targets.base import BuilderUnsupportedError, BuiltGraph, ExportOptions

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

CONV_STATE, RECURRENT_STATE = "conv_state", "recurrent_state"
Shapes = list[dict[str, tuple[int | None, ...]]]
"""Of every block what its cache holds: key, value or a state -> its sizes after the batch, None where it grows."""

_UNEQUAL = "onnxruntime-genai (0.18) makes cached values as wide as keys, and this model's are not"


class TransformersBuilder:
    """See `slimexport.targets.base.Builder`."""

    name = "transformers"

    def build(self, model: PreTrainedModel, options: ExportOptions) -> BuiltGraph:
        if why := _never(model.config):
            raise BuilderUnsupportedError(why)
        try:
            model = _prepared(model, options)
            shapes = _cache_shapes(model)
            if options.float_precision == "bf16" and not all("key" in of for of in shapes):
                raise BuilderUnsupportedError(
                    "its states begin with zeros, and ONNX Runtime's Python takes none in bf16: use fp16."
                )
            program = _trace(model, shapes, options)
            _rename(program.graph, shapes)
        except (BuilderUnsupportedError, MemoryError):
            raise
        except Exception as error:  # tracing runs the model's own code: anything can be raised there
            raise BuilderUnsupportedError(f"it failed with {type(error).__name__}: {_head(error)}") from error
        _forget_origin(program)
        return BuiltGraph(
            model=program,
            inputs=tuple(value.name for value in program.graph.inputs),
            outputs=tuple(value.name for value in program.graph.outputs),
            kv_heads=tuple(of["key"][0] or 0 if "key" in of else 0 for of in shapes),
            query_heads=_query_heads(model, shapes),
            head_dim=next((of["key"][2] or 0 for of in shapes if "key" in of), 0),
            left_padding=not any(CONV_STATE in of for of in shapes),  # nothing masks what it convolves
            shared_kv=False,
            convolved=max((of[CONV_STATE][-1] or 0 for of in shapes if CONV_STATE in of), default=0),
            no_genai="" if all(of.get("key") == of.get("value") for of in shapes) else _UNEQUAL,
        )


def _never(config: PreTrainedConfig) -> str:
    """Why a model like this cannot be traced, where that is known."""
    from slimexport.architectures import registry

    return registry.get(config.model_type).no_trace if config.model_type in registry.names() else ""


def _prepared(model: PreTrainedModel, options: ExportOptions) -> PreTrainedModel:
    """`model` on the CPU in the export's precision; a copy wherever that is a change."""
    import torch

    dtype = getattr(torch, DTYPES[options.float_precision])
    if model.device.type == "cpu" and model.dtype == dtype:
        return model
    made = copy.deepcopy(model).to("cpu")
    cast_parameters(made, dtype)
    return made


def _cache_shapes(model: PreTrainedModel) -> Shapes:
    """From the cache that one token leaves behind."""
    import torch

    with torch.no_grad():
        output = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True)
    layers = getattr(cache_of(output), "layers", None) or []
    shapes: Shapes = []
    for layer in layers:
        of: dict[str, tuple[int | None, ...]] = {}
        for name in ("key", "value"):
            grown = getattr(layer, f"{name}s", None)
            if grown is not None and grown.dim() == 4:
                of[name] = (grown.shape[1], None, grown.shape[3])
        for name in (CONV_STATE, RECURRENT_STATE):
            states = [state for state in getattr(layer, f"{name}s", {}).values() if state is not None]
            if len(states) == 1:
                of[name] = tuple(states[0].shape[1:])
        shapes.append(of)
    if not shapes or not all(shapes):
        raise BuilderUnsupportedError("its cache does not hold key and value, or one state, of every block.")
    return shapes


def _sample(model: PreTrainedModel, shapes: Shapes) -> dict[str, Any]:
    """Inputs to trace with: every size that stays dynamic is above 1, and one row is really padded.

    torch.export would otherwise take a size of 1, or a mask that masks nothing, for a constant.
    """
    import torch
    from transformers import DynamicCache

    batch, past, tokens = 2, 5, 3
    mask = torch.ones(batch, past + tokens, dtype=torch.int64)
    mask[0, :2] = 0
    cache: DynamicCache = DynamicCache()
    if all("key" in of for of in shapes):
        for block, of in enumerate(shapes):
            key, value = (
                torch.zeros(batch, heads or 0, past, width or 0, dtype=model.dtype)
                for heads, _, width in (of["key"], of["value"])
            )
            cache.update(key, value, block)
    else:  # only the model itself knows what kinds of states go where
        with torch.no_grad():
            ids = torch.zeros(batch, past, dtype=torch.int64)
            cache = cache_of(model(input_ids=ids, attention_mask=mask[:, :past], use_cache=True))
    return {
        "input_ids": torch.zeros(batch, tokens, dtype=torch.int64),
        "attention_mask": mask,
        "position_ids": torch.arange(past, past + tokens).expand(batch, tokens).clone(),
        cache_argument(model): cache,
        "use_cache": True,
    }


def _trace(model: PreTrainedModel, shapes: Shapes, options: ExportOptions) -> Any:
    """The onnx_ir Model, fused for the provider."""
    import torch
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    auto = torch.export.Dim.AUTO
    dynamic: dict[str, Any] = {name: {0: auto, 1: auto} for name in ("input_ids", "attention_mask", "position_ids")}
    dynamic[cache_argument(model)] = [{0: auto, **{i + 1: auto for i, size in enumerate(sizes) if size is None}}
                                  for of in shapes for sizes in of.values()]  # fmt: skip
    config = OnnxConfig(dynamic=True, dynamic_shapes=dynamic, ort_fusions=PROVIDERS[options.provider].fusions)
    return OnnxExporter().export(model, _sample(model, shapes), config=config).program


def _contract_name(theirs: str, plain: Sequence[str], prefix: str) -> str:
    """What the contract calls an input or output: what stands before `layers.N.keys` has changed from one release of
    transformers to the next (`input.past_key_values.` in 5.23, `past_key_values.` and `cache.` in 5.24)."""
    found = re.fullmatch(r"(?:\w+\.)*layers\.(\d+)\.(key|value|conv_state|recurrent_state)s(?:\.0)?", theirs)
    if theirs in plain or found is None:
        return theirs
    return f"{prefix}.{found[1]}.{found[2]}"


def _rename(graph: Any, shapes: Shapes) -> None:
    """Gives inputs and outputs the names and dimension names of the contract (targets/base.py)."""
    import onnx_ir as ir

    held = [(block, part, sizes) for block, of in enumerate(shapes) for part, sizes in of.items()]
    for values, plain, prefix in (
        (graph.inputs, ("input_ids", "attention_mask", "position_ids"), "past_key_values"),
        (graph.outputs, ("logits",), "present"),
    ):
        ours = [_contract_name(value.name, plain, prefix) for value in values]
        if sorted(ours) != sorted([*plain, *(f"{prefix}.{block}.{part}" for block, part, _ in held)]):
            raise BuilderUnsupportedError(f"its graph has the inputs or outputs {[value.name for value in values]}.")
        for value, name in zip(values, ours, strict=True):
            value.name = name

    batch, tokens, past, total = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
    dims: dict[str, list[Any]] = {
        "input_ids": [batch, tokens],
        "attention_mask": [batch, total],
        "position_ids": [batch, tokens],
    }
    for block, part, sizes in held:
        for prefix, length in (("past_key_values", past), ("present", total)):
            dims[f"{prefix}.{block}.{part}"] = [batch, *(length if size is None else size for size in sizes)]
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


def _query_heads(model: PreTrainedModel, shapes: Shapes) -> int:
    """The largest count of query heads, where the blocks show it; else the KV heads' (it is informative only)."""
    from slimexport.targets.builders.sizes import architecture

    try:
        return max(block.query_heads for block in architecture(model).blocks)
    except BuilderUnsupportedError:
        return max(of["key"][0] or 0 for of in shapes if "key" in of)


def _head(error: Exception) -> str:
    """The first line: torch.export's errors come with pages of advice."""
    return (str(error).strip().splitlines() or [""])[0][:300]
