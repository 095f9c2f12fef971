"""Tiny random models of every family, all sizes different from each other, so that no swapped dimension can pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from slimexport import testing
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
    """`slimexport.testing.tiny_model` with the sizes and switches above."""
    model = testing.tiny_model(tiny_config(family, **changes), seed)
    for parameter in model.parameters():  # not the rotary buffers
        parameter.data = parameter.data.to(dtype)
    return model


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
