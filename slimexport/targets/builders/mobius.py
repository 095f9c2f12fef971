"""The default builder: mobius writes the graph from its own module tree, in seconds, with ONNX Runtime's fused ops.

mobius gives all decoder layers the same sizes. Here every block is built from a config of its own sizes, and the
graph's KV inputs and outputs get each block's own head count; weights come from memory, never from disk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from slimexport.architectures import architecture_of
from slimexport.architectures.weights import KEY_VALUE
from slimexport.artifacts import BlockSizes
from slimexport.loading import is_tied
from slimexport.providers import PROVIDERS
from slimexport.targets.base import BuilderUnsupportedError, BuiltGraph, ExportOptions
from slimexport.targets.builders.sizes import architecture, plain_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from slimexport.architectures.base import Architecture

# Families whose graphs were compared with torch, both layouts; mobius is silently wrong on some of the others.
FAMILIES = (
    "apertus", "arcee", "biogpt", "cohere2", "cwm", "ernie4_5", "exaone", "exaone4", "flex_olmo", "gemma", "gemma2",
    "gpt_neox", "granite", "granitemoe", "helium", "internlm3", "iquestcoder", "llama", "ministral", "ministral3",
    "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3",
    "starcoder2",
)  # fmt: skip
# Families that mobius does not know, and others, of the same modules, that it does.
_AS = {"cwm": "llama", "internlm3": "llama", "iquestcoder": "llama", "qwen3_5_moe_text": "qwen3_5_moe"}
# Positions turn as in torch for every length; "dynamic" and "longrope" depend on the length of the sequence.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_INTERLEAVED = ("cohere2", "ernie4_5", "helium")  # neighbours turn together, not halves of the head
_TURNED_IN_WINDOWS = ("cohere2", "exaone4")  # blocks without a window have no positions
_SCALED_EMBEDDINGS = ("gemma", "gemma2")  # by the root of the width, which mobius rounds

_KINDS = ("full_attention", "linear_attention")  # of blocks, where a model has several

_GQA_HEAD_DIM = 16  # GroupQueryAttention needs a multiple of this (a rotary half of 8)

_DTYPES = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}


class MobiusBuilder:
    """See `slimexport.targets.base.Builder`."""

    name = "mobius"

    def build(self, model: PreTrainedModel, options: ExportOptions) -> BuiltGraph:
        if why := why_not(model.config):
            raise BuilderUnsupportedError(why)
        known = architecture(model)
        sizes = known.blocks
        try:
            package, notes = _build(model, known, options)
        except (BuilderUnsupportedError, MemoryError):
            raise
        except Exception as error:  # 0.x: any exception of its own means that this model is not for it
            raise BuilderUnsupportedError(f"it failed with {type(error).__name__}: {error}") from error
        graph = package["model"].graph
        operators = [node.op_type for node in graph]
        fused, plain = operators.count("GroupQueryAttention"), operators.count("Attention")
        attending = sum(own.has_heads for own in known.by_block)
        if fused + plain != attending:
            raise BuilderUnsupportedError(f"its graph has {fused + plain} attention operators for {attending} blocks.")
        return BuiltGraph(
            model=package["model"],
            inputs=tuple(value.name for value in graph.inputs),
            outputs=tuple(value.name for value in graph.outputs),
            kv_heads=tuple(b.kv_groups if own.has_heads else 0 for own, b in zip(known.by_block, sizes, strict=True)),
            query_heads=max(block.query_heads for block in sizes),
            head_dim=known.head_dim,
            # GroupQueryAttention takes the last positions from the mask's sum, and nothing masks linear attention.
            left_padding=fused == 0 and attending == len(sizes),
            shared_kv=fused == len(sizes),
            notes=notes,
        )


def knows(config: PreTrainedConfig) -> bool:
    """Whether graphs of models like this one were found right."""
    return not why_not(config)


def why_not(config: PreTrainedConfig) -> str:
    """What it is that was not found right; nothing where all was."""
    unlike = (config.model_type == "gpt_neox" and not config.use_parallel_residual) or (
        config.model_type == "persimmon" and not config.qk_layernorm
    )
    unlike |= config.model_type not in FAMILIES
    if unlike or not {flag for of in architecture_of(config, "").block_flags for flag in of} <= set(_KINDS):
        return f"{config.model_type!r} (of this kind) is not among those checked: {', '.join(FAMILIES)}."
    if others := _rope_types(config) - {*ROPE_TYPES, None}:
        return f"rope type {others.pop()!r} is not among {', '.join(ROPE_TYPES)}."
    return ""


def _rope_types(config: PreTrainedConfig) -> set[str | None]:
    """Of all blocks: some families have parameters by the kind of the block."""
    rope = getattr(config, "rope_parameters", None) or {}
    each = [of for of in rope.values() if isinstance(of, dict)] or [rope]
    return {of.get("rope_type") for of in each}


def _build(model: PreTrainedModel, known: Architecture, options: ExportOptions) -> tuple[Any, tuple[str, ...]]:
    """The mobius ModelPackage of `model`, weights applied, and notes."""
    import mobius

    module_class = mobius.registry.get(_AS.get(model.config.model_type, model.config.model_type))
    config = _config(model, known, options, module_class)
    module = module_class(config)
    if known.family.model_type in _SCALED_EMBEDDINGS:
        module.model.embed_tokens.embed_scale = known.hidden**0.5
    parent, name = _place_of_layers(module, len(known.blocks))
    whole = {sizes: module_class(_block_config(config, known, sizes)) for sizes in set(known.blocks)}
    # Of a whole model of each block's sizes its own layer, whatever the constructors of layers are given.
    own = [_layers(whole[sizes], len(known.blocks))[index] for index, sizes in enumerate(known.blocks)]
    setattr(parent, name, type(getattr(parent, name))(own))
    provider, notes = _execution_provider(config, options)
    task = _per_block_task(known)
    package = mobius.build_from_module(module, config, task=task, execution_provider=provider)
    graph = package["model"].graph
    weights = _weights(model, module, known, config)
    _correct_attention(graph, known.family.model_type, _windows(model.config, len(known.blocks)))
    if config.tie_word_embeddings:
        _tie_head(graph, weights)
    if unknown := sorted(set(weights) - set(graph.initializers)):
        raise BuilderUnsupportedError(f"its graph has no place for the weight {unknown[0]}.")
    package.apply_weights(weights)
    if missing := sorted(name for name, value in graph.initializers.items() if value.const_value is None):
        raise BuilderUnsupportedError(f"the model has no weight {missing[0]}.")
    graph.name = model.config.model_type
    return package, notes


def _place_of_layers(module: Any, count: int) -> tuple[Any, str]:
    """Where a mobius module keeps the list of its `count` decoder layers."""
    from onnxscript import nn

    for path, found in module.named_modules():
        if isinstance(found, nn.ModuleList) and len(found) == count:
            above, _, name = path.rpartition(".")
            return functools.reduce(getattr, filter(None, above.split(".")), module), name
    raise BuilderUnsupportedError(f"mobius' {type(module).__name__} has no list of {count} layers.")


def _layers(module: Any, count: int) -> Any:
    return getattr(*_place_of_layers(module, count))


def _config(model: PreTrainedModel, known: Architecture, options: ExportOptions, module_class: Any) -> Any:
    """The mobius config: from the HF config, corrected by what the weights show."""
    import onnx_ir
    from mobius._config_resolver import _config_from_hf

    hf_config = plain_config(model)
    config = _config_from_hf(hf_config, module_class=module_class)
    biases = {w for own in known.by_block for w in own.block_weights() if w.name.endswith(".bias")}
    names = {weight.name for weight in biases}
    config = dataclasses.replace(
        config,
        dtype=onnx_ir.DataType[_DTYPES[options.float_precision]],
        head_dim=known.head_dim,
        # Biases as the weights have them: mobius does not read Llama's `mlp_bias`, for one.
        attn_qkv_bias=any(weight.runs_along(KEY_VALUE) for weight in biases),
        attn_o_bias=f"{known.family.attention_output}.bias" in names,
        mlp_bias=f"{known.family.ffn_output}.bias" in names,
        tie_word_embeddings=is_tied(model),
        quantization=None,
        sliding_window=None,  # see _correct_attention
    )
    return _block_config(
        config, known, max(known.blocks, key=lambda block: block.channels)
    )  # passes mobius' validation


def _windows(config: Any, blocks: int) -> list[int | None]:
    """The sliding window of every block, None where it attends to everything or no sequence is longer."""
    window = getattr(config, "sliding_window", None)
    if not window or window >= config.max_position_embeddings:
        return [None] * blocks
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * blocks
    return [int(window) if kind == "sliding_attention" else None for kind in types]


def _correct_attention(graph: Any, family: str, windows: list[int | None]) -> None:
    """What mobius does alike in all blocks, or in all families, and GroupQueryAttention can do for each."""
    import onnx_ir as ir

    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    changes = bool(any(windows)) or family in _INTERLEAVED
    if changes and len(nodes) != len(windows):
        raise BuilderUnsupportedError("neither sliding windows nor interleaved positions without GroupQueryAttention.")
    for node, window in zip(nodes, windows, strict=False):
        values = {"local_window_size": window or -1} if any(windows) else {}
        if family in _INTERLEAVED:
            values["rotary_interleaved"] = 1
        if family in _TURNED_IN_WINDOWS and any(windows) and window is None:
            values["do_rotary"] = 0
        for name, value in values.items():
            node.attributes[name] = ir.AttrInt64(name, value)


def _block_config(config: Any, known: Architecture, block: BlockSizes) -> Any:
    routed = known.family.channels_field == "moe_intermediate_size"
    return dataclasses.replace(
        config,
        num_attention_heads=block.query_heads,
        num_key_value_heads=block.kv_groups,
        **{"moe_intermediate_size" if routed else "intermediate_size": block.channels},
    )


def _execution_provider(config: Any, options: ExportOptions) -> tuple[str, tuple[str, ...]]:
    """mobius' name for what the graph is optimised for, and a note where that is not the provider asked for."""
    import mobius

    provider = PROVIDERS[options.provider].builder
    notes: tuple[str, ...] = ()
    fused = config.dtype in mobius.ep_registry.require(provider).gqa_dtypes
    share = config.partial_rotary_factor
    turned = int(config.head_dim * (1.0 if share is None else share))
    if fused and (config.head_dim % _GQA_HEAD_DIM or turned % _GQA_HEAD_DIM):
        provider, fused = "default", False
        widths = f"head_dim {config.head_dim}, of which {turned} turn with positions"
        notes = (f"{widths}: not both multiples of {_GQA_HEAD_DIM}, so without GroupQueryAttention.",)
    return provider, notes


def _weights(model: PreTrainedModel, module: Any, known: Architecture, config: Any) -> dict[str, torch.Tensor]:
    """mobius' name -> CPU tensor."""
    stored = {name: tensor.detach().to("cpu").contiguous() for name, tensor in model.state_dict().items()}
    weights: dict[str, torch.Tensor] = {}
    for index, sizes in enumerate(known.blocks):
        prefix = f"{known.family.blocks}.{index}."
        own = {name: stored.pop(name) for name in list(stored) if name.startswith(prefix)}
        untied = dataclasses.replace(_block_config(config, known, sizes), tie_word_embeddings=False)
        weights |= _preprocessed(module, untied, own)
    return weights | _preprocessed(module, config, stored)


def _tie_head(graph: Any, weights: dict[str, torch.Tensor]) -> None:
    """One tensor for embedding and head: some of mobius' models have two even where they are tied."""
    import onnx_ir as ir

    head = weights.pop("lm_head.weight", None)
    if head is None or "lm_head.weight" not in graph.initializers:
        return
    same = next(name for name, tensor in weights.items() if tensor.data_ptr() == head.data_ptr())
    ir.convenience.replace_all_uses_with(graph.initializers["lm_head.weight"], graph.initializers[same])
    del graph.initializers["lm_head.weight"]


def _preprocessed(module: Any, config: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights` under mobius' own names: it looks sizes up in the module's config."""
    kept, module.config = module.config, config
    try:
        made: dict[str, torch.Tensor] = module.preprocess_weights(weights)
    finally:
        module.config = kept
    return {name: tensor.contiguous() for name, tensor in made.items()}


def _per_block_task(known: Architecture) -> Any:
    """A mobius task that wires the graph's inputs and outputs, with each block's own KV heads."""
    import onnx_ir as ir
    from mobius import ModelPackage, ModelTask
    from mobius.tasks._base import _make_graph, _make_model

    class PerBlockCausalLM(ModelTask):
        def build(self, module: Any, config: Any) -> Any:
            graph, builder = _make_graph()
            batch, past = ir.SymbolicDim("batch_size"), ir.SymbolicDim("past_sequence_length")
            tokens, total = ir.SymbolicDim("sequence_length"), ir.SymbolicDim("total_sequence_length")
            integer = ir.DataType.INT64
            input_ids = builder.input("input_ids", dtype=integer, shape=[batch, tokens])
            mask = builder.input("attention_mask", dtype=integer, shape=[batch, total])
            positions = builder.input("position_ids", dtype=integer, shape=[batch, tokens])
            cache, held = [], list(_cache_shapes(known, module.config))
            for index, shapes in enumerate(held):
                names = [f"past_key_values.{index}.{part}" for part in shapes]
                here = [[batch, *(past if size is None else size for size in shape)] for shape in shapes.values()]
                values = zip(names, here, strict=True)
                cache.append(tuple(builder.input(name, dtype=config.dtype, shape=shape) for name, shape in values))
            logits, present = module(
                builder.op, input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache
            )
            builder.add_output(logits, "logits")
            for index, (shapes, pair) in enumerate(zip(held, present, strict=True)):
                for value, (part, shape) in zip(pair, shapes.items(), strict=True):
                    # Stated, not inferred: shape inference derives a wrong head_dim from packed QKV.
                    value.shape = ir.Shape([batch, *(total if size is None else size for size in shape)])
                    value.type = ir.TensorType(config.dtype)
                    builder.add_output(value, f"present.{index}.{part}")
            return ModelPackage({"model": _make_model(graph)}, config=config)

    return PerBlockCausalLM()


def _cache_shapes(known: Architecture, config: Any) -> Iterator[dict[str, tuple[int | None, ...]]]:
    """What each block caches -> its sizes after the batch, None where it grows; `config` is mobius' own."""
    for own, block in zip(known.by_block, known.blocks, strict=True):
        if own.has_heads:
            yield dict.fromkeys(("key", "value"), (block.kv_groups, None, known.head_dim))
        else:
            from mobius.tasks._cache_utils import linear_attention_dims

            of = linear_attention_dims(config)
            yield {
                "conv_state": (of.conv_dim, of.conv_kernel - 1),
                "recurrent_state": (of.num_v_heads, of.head_k_dim, of.head_v_dim),
            }
