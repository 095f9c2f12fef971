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
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 6, "q_lora_rank": 56, "kv_lora_rank": 48, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16,
    "v_head_dim": 20, "attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
_HALF_TURNED: dict[str, Any] = {  # half of a head, in pieces of 16, is what ONNX Runtime's attention can turn
    "hidden_size": 192, "intermediate_size": 176,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}  # fmt: skip
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    "attention_bias": True, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 32, "hidden_size": 200,  # half of a head turns, as ONNX Runtime's attention can
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}  # fmt: skip
_EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 12, "tie_word_embeddings": False},
    "ministral": {"sliding_window": 12, "layer_types": _SLIDING},
    "ministral3": {"sliding_window": None},
    "qwen3": {"attention_bias": True},
    "gemma": {"attention_bias": True},
    "gemma2": {"sliding_window": 12, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0,
               "layer_types": _SLIDING},
    "gemma3_text": {"sliding_window": 12, "query_pre_attn_scalar": 16,
                    "layer_types": _SLIDING},
    "granite": {"attention_bias": True, "mlp_bias": True, "residual_multiplier": 0.5, "embedding_multiplier": 3.0,
                "logits_scaling": 2.0, "attention_multiplier": 0.2},
    "smollm3": {"attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 0, 1]},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "ernie4_5": {"use_bias": True},
    "helium": {"attention_bias": True, "mlp_bias": True, "hidden_size": 96},
    "cohere": {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5},
    "cohere2": {"hidden_size": 96, "sliding_window": 12, "logit_scale": 0.5,
                "layer_types": _SLIDING},
    "olmo": {"attention_bias": True},
    "olmo2": {"attention_bias": True},
    "olmo3": {"sliding_window": 12, "layer_types": _SLIDING},
    "exaone4": {"sliding_window": 12, "layer_types": _SLIDING},
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True},
    "phi": {**_HALF_TURNED, "head_dim": 32, "tie_word_embeddings": False},
    "phi3": {"tie_word_embeddings": False},
    "starcoder2": {"use_bias": True},
    "arcee": {"attention_bias": True, "mlp_bias": True},
    "nemotron": {"attention_bias": True, "mlp_bias": True},
    "stablelm": {"use_qkv_bias": True, **_HALF_TURNED},
    "gpt_neox": {**_HALF_TURNED, "tie_word_embeddings": False},
    "lfm2": {"conv_bias": True, "layer_types": ["conv", "full_attention", "conv"], "intermediate_size": 111,
             "block_multiple_of": 8},
    "opt": {"hidden_size": 96, "ffn_dim": 80, "word_embed_proj_dim": 96},
    "gpt2": {"hidden_size": 96, "n_inner": 80},
    "gpt_bigcode": {"hidden_size": 96, "n_inner": 80, "multi_query": True},
    "falcon": {"hidden_size": 96, "ffn_hidden_size": 80, "num_kv_heads": 3, "new_decoder_architecture": True,
               "alibi": False, "bias": True},
    "exaone": {"attention_bias": True, "mlp_bias": True},
    "internlm3": {"attention_bias": True, "mlp_bias": True},
    "iquestcoder": {"attention_bias": True, "mlp_bias": True},
    "cwm": {"mlp_bias": True, "sliding_window": 12,
            "layer_types": _SLIDING},
    "hyperclovax": {"attention_bias": True, "mlp_bias": True, "residual_multiplier": 0.5, "embedding_multiplier": 3.0,
                    "logits_scaling": 0.5, "attention_multiplier": 0.2},
    "nanochat": {"attention_bias": True, "final_logit_softcapping": 5.0},
    "vaultgemma": {"attention_bias": True, "sliding_window": 12, "query_pre_attn_scalar": 16,
                   "final_logit_softcapping": 5.0,
                   "layer_types": _SLIDING},
    "granite_swa": {"attention_bias": True, "mlp_bias": True, "residual_multiplier": 0.5, "sliding_window": 12,
                    "layer_types": _SLIDING,
                    "layer_rope_theta": [10000.0, 0, 5000.0]},
    "granitemoehybrid": {"attention_bias": True, "shared_intermediate_size": 80, "num_local_experts": 0,
                         "layer_types": ["full_attention"] * BLOCKS, "position_embedding_type": "rope",
                         "residual_multiplier": 0.5, "mamba_n_heads": 8},
    "ctrl": {"hidden_size": 96, "dff": 80},
    "gptj": {"hidden_size": 96, "n_inner": 80, "rotary_dim": 8, "tie_word_embeddings": False},
    "gpt_neo": {"hidden_size": 96, "intermediate_size": 80, "window_size": 12,
                "attention_types": [[["global", "local", "global"], 1]]},
    "biogpt": {"hidden_size": 96, "tie_word_embeddings": False},
    "persimmon": _HALF_TURNED,
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 5, "num_experts_per_tok": 2, "residual_multiplier": 0.5},
    "phimoe": {"lm_head_bias": True, "tie_word_embeddings": False, "num_local_experts": 5, "num_experts_per_tok": 2},
    "olmoe": {"hidden_size": 96, "num_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    "qwen2_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
                  "shared_expert_intermediate_size": 56},
    "glm4_moe": {**_MOE, "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1, "use_qk_norm": True,
                 "attention_bias": True, "n_group": 2, "topk_group": 1},
    "dots1": {**_MOE, "n_routed_experts": 6, "n_shared_experts": 2, "first_k_dense_replace": 1, "attention_bias": True,
              "sliding_window": 12, "layer_types": _SLIDING},
    "exaone_moe": {**_MOE, "num_experts": 6, "num_shared_experts": 2, "sliding_window": 12,
                   "mlp_layer_types": ["dense", "sparse", "sparse"],
                   "layer_types": _SLIDING},
    "ernie4_5_moe": {"moe_intermediate_size": 40, "moe_num_experts": 5, "moe_k": 2, "moe_num_shared_experts": 2,
                     "use_bias": True, "moe_layer_start_index": 1, "moe_layer_end_index": 2},
    "lfm2_moe": {**_MOE, "num_experts": 5, "conv_bias": True, "num_dense_layers": 1,
                 "layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": {**_LINEAR, **_MOE, "num_experts": 5, "shared_expert_intermediate_size": 56},
    "qwen3_next": {**_LINEAR, **_MOE, "num_experts": 5, "shared_expert_intermediate_size": 56},
    "solar_open": {**_MOE, "n_routed_experts": 6, "n_shared_experts": 2, "attention_bias": True, "n_group": 2,
                   "topk_group": 1},
    "sarvam_moe": {**_MOE, "n_routed_experts": 6, "n_shared_experts": 2, "first_k_dense_replace": 1,
                   "attention_bias": True, "n_group": 2, "topk_group": 1},
    "afmoe": {**_MOE, "num_experts": 6, "num_shared_experts": 2, "num_dense_layers": 1, "attention_bias": True,
              "sliding_window": 12, "layer_types": _SLIDING},
    "beam": {**_MOE, "num_experts": 6, "n_group": 2, "topk_group": 1, "attention_bias": True, "sliding_window": 12,
             "layer_types": _SLIDING, "mlp_layer_types": ["dense", "sparse", "sparse"],
             "final_logit_softcapping": 5.0},
    "cohere2_moe": {"num_experts": 5, "num_experts_per_tok": 2, "num_shared_experts": 2, "attention_bias": True,
                    "sliding_window": 12, "layer_types": _SLIDING, "logit_scale": 0.5,
                    "prefix_dense_intermediate_size": 72, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "hy_v3": {**_MOE, "num_experts": 6, "num_shared_experts": 2, "attention_bias": True, "mlp_bias": True},
    "kolibri1": {**_MOE, "num_experts": 5, "shared_expert_intermediate_size": 56, "sliding_window": 12,
                 "layer_types": _SLIDING},
    "laguna": {**_MOE, "num_experts": 6, "shared_expert_intermediate_size": 56, "attention_bias": True,
               "sliding_window": 12, "layer_types": _SLIDING},
    "youtu": {**_LATENT, "pad_token_id": None},  # transformers 5.24 makes the padding's row zero in loading
    "minicpm3": {**_LATENT, "scale_emb": 3, "scale_depth": 1.2, "dim_model_base": 60, "mlp_bias": True},
    "deepseek_v3": {**_LATENT, **_MOE, "n_routed_experts": 6, "n_shared_experts": 2, "first_k_dense_replace": 1,
                    "n_group": 2, "topk_group": 1},
    "deepseek_v2": {**_LATENT, **_MOE, "n_routed_experts": 5, "n_shared_experts": 2, "first_k_dense_replace": 1,
                    "q_lora_rank": None, "mlp_bias": True},
    "sarvam_mla": {**_LATENT, **_MOE, "n_routed_experts": 5, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "axk1": {**_LATENT, **_MOE, "n_routed_experts": 6, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
             "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "glm4_moe_lite": {**_LATENT, **_MOE, "n_routed_experts": 6, "n_shared_experts": 1,
                      "mlp_layer_types": ["sparse", "dense", "sparse"]},
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 12, "swiglu_limit": 1.5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "minimax_m2": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "lfm3": {"conv_bias": True, "attention_bias": True, "layer_types": ["conv", "full_attention", "conv"]},
    "apertus": {"attention_bias": True},
    "apertus1p5_text": {"attention_bias": True},
    "flex_olmo": {"attention_bias": True, "num_experts": 5, "num_experts_per_tok": 2},
    "mellum": {"attention_bias": True, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
               "sliding_window": 12, "layer_types": _SLIDING},
    "granitemoeshared": {"attention_bias": True, "num_local_experts": 5, "num_experts_per_tok": 2,
                         "residual_multiplier": 0.5, "shared_intermediate_size": 56},
    "granitemoe_swa": {"attention_bias": True, "num_local_experts": 5, "num_experts_per_tok": 2,
                       "residual_multiplier": 0.5, "shared_intermediate_size": 56, "sliding_window": 12,
                       "layer_types": _SLIDING,
                       "layer_rope_theta": [10000.0, 0, 5000.0]},
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # models of a family that differ in kind
    "gpt_bigcode, one group a head": ("gpt_bigcode", {"multi_query": False}),
    "falcon, one group": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "bias": False}),
    "falcon, one group a head": (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 6, "parallel_attn": False},
    ),
    "stablelm, side by side": ("stablelm", {"use_parallel_residual": True}),
    "hyperclovax, outputs not normed": ("hyperclovax", {"use_post_norm": False}),
    "granitemoeshared, experts alone": ("granitemoeshared", {"shared_intermediate_size": 0}),
    "persimmon, heads not normed": ("persimmon", {"qk_layernorm": False}),
    "qwen2_moe, one block without experts": ("qwen2_moe", {"mlp_only_layers": [1]}),
    "qwen3_moe, every second block without experts": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "qwen3_next, one block without experts": ("qwen3_next", {"mlp_only_layers": [0]}),
    "qwen3_5_text, a narrow head": (
        "qwen3_5_text",
        {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    ),
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
