"""The default builder: mobius writes the graph from its own module tree, in seconds, with ONNX Runtime's fused ops.

mobius gives all decoder layers the same sizes. Here every block is built from a config of its own sizes, and the
graph's KV inputs and outputs get each block's own head count; weights come from memory, never from disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.artifacts import BlockSizes
from slimexport.targets.base import BuilderUnsupportedError, BuiltGraph, ExportOptions
from slimexport.targets.builders.sizes import block_sizes, decoder_blocks, head_dim, linear, plain_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Families whose graphs were compared with torch, both layouts; mobius is silently wrong on some of the others.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Positions turn as in torch for every length; "dynamic" and "longrope" depend on the length of the sequence.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_GQA_HEAD_DIM = 16  # GroupQueryAttention needs a multiple of this (a rotary half of 8)

_DTYPES = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}


class MobiusBuilder:
    """See `slimexport.targets.base.Builder`."""

    name = "mobius"

    def build(self, model: PreTrainedModel, directory: Path, options: ExportOptions) -> BuiltGraph:
        family = model.config.model_type
        if family not in FAMILIES:
            raise BuilderUnsupportedError(f"model type {family!r} is not among those checked: {', '.join(FAMILIES)}.")
        sizes = block_sizes(model)
        try:
            package, notes = _build(model, sizes, options)
        except (BuilderUnsupportedError, MemoryError):
            raise
        except Exception as error:  # 0.x: any exception of its own means that this model is not for it
            raise BuilderUnsupportedError(f"it failed with {type(error).__name__}: {error}") from error
        graph = package["model"].graph
        operators = [node.op_type for node in graph]
        fused, plain = operators.count("GroupQueryAttention"), operators.count("Attention")
        if fused + plain != len(sizes):
            raise BuilderUnsupportedError(f"its graph has {fused + plain} attention operators for {len(sizes)} blocks.")
        package.save(str(directory), progress_bar=False)
        return BuiltGraph(
            inputs=tuple(value.name for value in graph.inputs),
            outputs=tuple(value.name for value in graph.outputs),
            kv_heads=tuple(block.kv_groups for block in sizes),
            query_heads=max(block.query_heads for block in sizes),
            head_dim=head_dim(model),
            left_padding=fused == 0,  # GroupQueryAttention takes the last positions from the mask's sum
            shared_kv=fused == len(sizes),
            notes=notes,
        )


def _build(model: PreTrainedModel, sizes: Sequence[BlockSizes], options: ExportOptions) -> tuple[Any, tuple[str, ...]]:
    """The mobius ModelPackage of `model`, weights applied, and notes."""
    import mobius

    module_class = mobius.registry.get(model.config.model_type)
    config = _architecture(model, sizes, options, module_class)
    module = module_class(config)
    layers = [type(module.model.layers[0])(_block_config(config, block)) for block in sizes]
    module.model.layers = type(module.model.layers)(layers)
    provider, notes = _execution_provider(config, options)
    package = mobius.build_from_module(module, config, task=_per_block_task(sizes), execution_provider=provider)
    graph = package["model"].graph
    weights = _weights(model, tied=config.tie_word_embeddings)
    if unknown := sorted(set(weights) - set(graph.initializers)):
        raise BuilderUnsupportedError(f"its graph has no place for the weight {unknown[0]}.")
    package.apply_weights(weights)
    if missing := sorted(name for name, value in graph.initializers.items() if value.const_value is None):
        raise BuilderUnsupportedError(f"the model has no weight {missing[0]}.")
    graph.name = model.config.model_type
    return package, notes


def _architecture(
    model: PreTrainedModel, sizes: Sequence[BlockSizes], options: ExportOptions, module_class: Any
) -> Any:
    """The mobius config: from the HF config, corrected by what the weights show."""
    import onnx_ir
    from mobius._config_resolver import _config_from_hf

    hf_config = plain_config(model)
    config = _config_from_hf(hf_config, module_class=module_class)
    if config.rope_type not in ROPE_TYPES:
        raise BuilderUnsupportedError(f"rope type {config.rope_type!r} is not among {', '.join(ROPE_TYPES)}.")
    block = decoder_blocks(model)[0]
    config = dataclasses.replace(
        config,
        dtype=onnx_ir.DataType[_DTYPES[options.precision]],
        # Biases as the weights have them: mobius does not read Llama's `mlp_bias`, for one.
        attn_qkv_bias=linear(block, "self_attn.q_proj").bias is not None,
        attn_o_bias=linear(block, "self_attn.o_proj").bias is not None,
        mlp_bias=linear(block, "mlp.gate_proj").bias is not None,
        tie_word_embeddings=_is_tied(model),
        quantization=None,
        sliding_window=_window(hf_config),
    )
    return _block_config(config, max(sizes, key=lambda block: block.channels))  # one that passes mobius' validation


def _window(config: Any) -> int | None:
    """The sliding window, where it is shorter than the longest sequence.

    Refuses windows that differ per block: mobius would silently attend to everything instead.
    """
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
    if not window or window >= config.max_position_embeddings or types == {"full_attention"}:
        return None
    if len(types) > 1:
        raise BuilderUnsupportedError("blocks with and without sliding window in one model.")
    return int(window)


def _block_config(config: Any, block: BlockSizes) -> Any:
    return dataclasses.replace(
        config,
        num_attention_heads=block.query_heads,
        num_key_value_heads=block.kv_groups,
        intermediate_size=block.channels,
    )


def _execution_provider(config: Any, options: ExportOptions) -> tuple[str, tuple[str, ...]]:
    """mobius' name for what the graph is optimised for, and a note where that is not the provider asked for."""
    import mobius

    provider = options.provider
    notes: tuple[str, ...] = ()
    fused = config.dtype in mobius.ep_registry.require(provider).gqa_dtypes
    if fused and config.head_dim % _GQA_HEAD_DIM:
        provider, fused = "default", False
        notes = (f"head_dim {config.head_dim} is no multiple of {_GQA_HEAD_DIM}: without GroupQueryAttention.",)
    if not fused and config.sliding_window:
        raise BuilderUnsupportedError("no sliding window without GroupQueryAttention.")
    return provider, notes


def _is_tied(model: PreTrainedModel) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head.weight.data_ptr() == embedding.weight.data_ptr()


def _weights(model: PreTrainedModel, *, tied: bool) -> dict[str, torch.Tensor]:
    """Name -> CPU tensor; the tied head is left out, the graph has it once."""
    weights = {name: tensor.detach().to("cpu").contiguous() for name, tensor in model.state_dict().items()}
    if tied:
        weights.pop("lm_head.weight", None)
    return weights


def _per_block_task(sizes: Sequence[BlockSizes]) -> Any:
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
            cache = []
            for index, block in enumerate(sizes):
                shape = [batch, block.kv_groups, past, config.head_dim]
                names = (f"past_key_values.{index}.key", f"past_key_values.{index}.value")
                cache.append(tuple(builder.input(name, dtype=config.dtype, shape=shape) for name in names))
            logits, present = module(
                builder.op, input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache
            )
            builder.add_output(logits, "logits")
            for index, (block, pair) in enumerate(zip(sizes, present, strict=True)):
                for value, part in zip(pair, ("key", "value"), strict=True):
                    # Stated, not inferred: shape inference derives a wrong head_dim from packed QKV.
                    value.shape = ir.Shape([batch, block.kv_groups, total, config.head_dim])
                    value.type = ir.TensorType(config.dtype)
                    builder.add_output(value, f"present.{index}.{part}")
            return ModelPackage({"model": _make_model(graph)}, config=config)

    return PerBlockCausalLM()
