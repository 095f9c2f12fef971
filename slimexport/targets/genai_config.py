"""`genai_config.json`: how onnxruntime-genai calls the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimexport.targets.base import BuiltGraph, ExportOptions
from slimexport.targets.builders.sizes import raw

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Names that onnxruntime-genai knows; "decoder" is its generic decoder-only model and calls the graph the same way.
_TYPES = ("llama", "mistral", "qwen2", "qwen3", "lfm2")

_INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
}
_SAMPLING: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


def genai_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, graph: BuiltGraph, options: ExportOptions
) -> dict[str, Any]:
    """The content of `genai_config.json`.

    The head counts are single numbers there; onnxruntime-genai allocates each block's KV cache from the shapes of
    the graph's own inputs, so the largest of them is said.
    """
    config, generation = model.config, model.generation_config
    length = int(raw(config, "max_position_embeddings", 2048))
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": _provider_options(options)},
        "filename": "model.onnx",
        "head_size": graph.head_dim,
        "hidden_size": int(raw(config, "hidden_size")),
        "inputs": {key: name for key, name in _INPUTS.items() if name in graph.inputs}
        | {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": graph.query_heads,
        "num_hidden_layers": len(graph.kv_heads),
        "num_key_value_heads": max(graph.kv_heads),
    }
    if any(name.endswith(".recurrent_state") for name in graph.inputs):
        for key, prefix, root in (("inputs", "past", "past_key_values"), ("outputs", "present", "present")):
            for state in ("conv", "recurrent"):
                decoder[key][f"{prefix}_{state}_names"] = f"{root}.%d.{state}_state"
    elif graph.convolved:
        for key, prefix in (("inputs", "past"), ("outputs", "present")):
            root = "past_key_values" if prefix == "past" else prefix
            decoder[key][f"{prefix}_conv_names"] = f"{root}.%d.conv_state"
        decoder["conv_cache_size"] = graph.convolved
        decoder["layer_types"] = ["full_attention" if heads else "conv" for heads in graph.kv_heads]
    return {
        "model": {
            **_special_tokens(config, generation, tokenizer),
            "context_length": length,
            "decoder": decoder,
            "type": config.model_type if config.model_type in _TYPES else "decoder",
            "vocab_size": int(raw(config, "vocab_size")),
        },
        "search": {
            **{name: _first(getattr(generation, name, None), default) for name, default in _SAMPLING.items()},
            "early_stopping": True,
            "max_length": length,
            "min_length": 0,
            "num_return_sequences": 1,
            "past_present_share_buffer": graph.shared_kv,
        },
    }


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _special_tokens(
    config: PretrainedConfig, generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Token ids as generation would use them: a chat model's end of turn stands in the generation config only."""
    found = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found[name] = _first(getattr(generation, name, None), raw(config, name), getattr(tokenizer, name, None))
    if found["pad_token_id"] is None:
        end = found["eos_token_id"]
        found["pad_token_id"] = end[0] if isinstance(end, list) else end
    return {name: value for name, value in found.items() if value is not None}


def _provider_options(options: ExportOptions) -> list[dict[str, dict[str, str]]]:
    """The CPU is onnxruntime-genai's default and has no entry."""
    return [] if options.provider == "cpu" else [{options.provider: {}}]
