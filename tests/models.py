"""Tiny random models of every family, all sizes different from each other, so that no swapped dimension can pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from slimexport.testing import VOCAB, tiny_tokenizer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def tiny_config(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": 256,
        "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family == "llama":
        sizes |= {"attention_bias": True, "mlp_bias": True}
    if family == "qwen3":
        sizes |= {"attention_bias": True}
    if family == "mistral":
        sizes |= {"sliding_window": None, "tie_word_embeddings": False}
    return AutoConfig.for_model(family, **(sizes | changes))


def tiny_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Weights large enough that heads and channels matter, biases and norms included."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        scale = 0.1 if name.endswith("bias") else 0.15
        noise = torch.randn_like(parameter) * scale
        parameter.data = (1 + noise if "norm" in name else noise).to(dtype)  # not the rotary buffers
    return model.eval().requires_grad_(False)


def tiny_directory(path: Path, family: str = "llama", **changes: Any) -> Path:
    """A Hugging Face directory of a tiny model, with tokenizer and chat template."""
    tiny_model(family, **changes).save_pretrained(str(path))
    tiny_tokenizer().save_pretrained(str(path))
    return path


def tiny_text(path: Path, words: int, seed: int) -> Path:
    """Random words with some structure: each depends on the one before."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 7, (words,), generator=generator).cumsum(0) + seed * 17
    path.write_text(" ".join(f"w{int(s) % (VOCAB - 3)}" for s in steps), encoding="utf-8")
    return path
