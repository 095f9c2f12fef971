"""Texts as token ids, and as windows: rows of equal length that do not overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimexport.errors import BadInputError
from slimexport.texts import Text

if TYPE_CHECKING:
    import torch


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """The ids of running text, without special tokens."""
    # verbose=False: the warning that the text is longer than the model's context is meant for prompts
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def pack(text: Text, tokenizer: Any) -> list[int]:
    """Running text as it is; documents one after another, each ended as in pretraining (eos, else bos)."""
    if len(text.documents) == 1:
        return tokenize(tokenizer, text.documents[0])
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    encoded = tokenizer(list(text.documents), add_special_tokens=False, verbose=False)["input_ids"]
    return [token for ids in encoded for token in (*ids, *(() if end is None else (end,)))]


def check_tokens(tokens: list[int], tokenizer: Any, name: str) -> None:
    """Raises BadInputError where there are none, or nothing but special ones."""
    if not tokens:
        raise BadInputError(f"{name} is empty: the tokenizer makes no tokens of it, text is needed.")
    if set(tokens) <= set(tokenizer.all_special_ids):
        raise BadInputError(
            f"{name} holds nothing but special tokens ({tokenizer.decode(tokens[:1])}): text is needed."
        )


def grid(tokens: list[int], length: int) -> torch.Tensor:
    """int64 [windows, length]: all of them, in the order of the text; a rest that fills none is left out."""
    import torch

    windows = len(tokens) // length
    return torch.tensor(tokens[: windows * length], dtype=torch.int64).view(windows, length)


def spread(available: int, count: int, seed: int) -> list[int]:
    """`count` indices below `available`, ascending and different: one drawn from each of `count` equal stretches."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    edges = [i * available // count for i in range(count + 1)]
    draws = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    return [a + int(u * (b - a)) for a, b, u in zip(edges[:-1], edges[1:], draws, strict=True)]
