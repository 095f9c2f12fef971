"""Tiny random models of every family, with every bias and norm there is, and sizes that all differ."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

VOCAB = 211
BLOCKS = 3

# Where a family can say head_dim, query heads together are narrower than the residual.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "num_hidden_layers": BLOCKS, "intermediate_size": 80, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 16, "hidden_size": 120, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
_HALF_TURNED: dict[str, Any] = {  # half of a head, in pieces of 16, is what ONNX Runtime's attention can turn
    "hidden_size": 192, "intermediate_size": 176,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}  # fmt: skip
_EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 12, "tie_word_embeddings": False},
    "ministral": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "ministral3": {"sliding_window": None},
    "qwen3": {"attention_bias": True},
    "gemma": {"attention_bias": True},
    "gemma2": {"sliding_window": 12, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0,
               "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3_text": {"sliding_window": 12, "query_pre_attn_scalar": 16,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "granite": {"attention_bias": True, "mlp_bias": True, "residual_multiplier": 0.5, "embedding_multiplier": 3.0,
                "logits_scaling": 2.0, "attention_multiplier": 0.2},
    "smollm3": {"attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 0, 1]},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "ernie4_5": {"use_bias": True},
    "helium": {"attention_bias": True, "mlp_bias": True, "hidden_size": 96},
    "cohere": {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5},
    "cohere2": {"hidden_size": 96, "sliding_window": 12, "logit_scale": 0.5,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "olmo": {"attention_bias": True},
    "olmo2": {"attention_bias": True},
    "olmo3": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "exaone4": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True},
    "phi": {**_HALF_TURNED, "head_dim": 32, "tie_word_embeddings": False},
    "phi3": {"tie_word_embeddings": False},
    "starcoder2": {"use_bias": True},
    "arcee": {"attention_bias": True, "mlp_bias": True},
    "nemotron": {"attention_bias": True, "mlp_bias": True},
    "stablelm": {"use_qkv_bias": True, **_HALF_TURNED},
    "gpt_neox": {**_HALF_TURNED, "tie_word_embeddings": False},
    "opt": {"hidden_size": 96, "ffn_dim": 80, "word_embed_proj_dim": 96},
    "gpt2": {"hidden_size": 96, "n_inner": 80},
    "gpt_bigcode": {"hidden_size": 96, "n_inner": 80, "multi_query": True},
    "falcon": {"hidden_size": 96, "ffn_hidden_size": 80, "num_kv_heads": 3, "new_decoder_architecture": True,
               "alibi": False, "bias": True},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 5, "num_experts_per_tok": 2, "residual_multiplier": 0.5},
    "phimoe": {"lm_head_bias": True, "tie_word_embeddings": False, "num_local_experts": 5, "num_experts_per_tok": 2},
    "olmoe": {"hidden_size": 96, "num_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    "qwen2_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
                  "shared_expert_intermediate_size": 56},
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # models of a family that differ in kind
    "gpt_bigcode, one group a head": ("gpt_bigcode", {"multi_query": False}),
    "falcon, one group": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "bias": False}),
    "falcon, one group a head": (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 6, "parallel_attn": False},
    ),
    "stablelm, side by side": ("stablelm", {"use_parallel_residual": True}),
    "gpt_neox, one after the other": ("gpt_neox", {"use_parallel_residual": False}),
}


def kinds() -> dict[str, tuple[str, dict[str, Any]]]:
    """All models that are tried: name -> what `tiny_config` is given."""
    from slimexport.architectures import registry

    return {name: (name, {}) for name in registry.names()} | VARIANTS


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Of a known family, with `changes`; of another one with what its config has of the usual fields."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    known = {**kind().to_dict(), **getattr(kind, "attribute_map", {})}
    sizes = {name: value for name, value in _SIZES.items() if name in known or name in ("head_dim",)}
    if "head_dim" not in known and "hidden_size" in _EXTRAS.get(model_type, {}):
        del sizes["head_dim"]
    return kind(**{**sizes, **_EXTRAS.get(model_type, {}), **changes})


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> Any:
    """Random weights in float32, large enough that heads and channels matter, norms and biases too."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter) * (0.1 if name.endswith("bias") else 0.15)
        is_norm = (parameter.dim() == 1 and not name.endswith("bias")) or ("norm" in name and name.endswith("weight"))
        parameter.data = 1 + noise if is_norm else noise
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Word-level: three special tokens and 'w0', 'w1', ... to the end of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(VOCAB - 3)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )  # fmt: skip
