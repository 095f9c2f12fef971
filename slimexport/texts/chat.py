"""Conversations that the model writes itself: our user turns in its chat template, its own answers.

What an instruction-tuned model mostly sees in use, the marks of its template included. A decode step costs about the
same for few rows and for many, so conversations are short rows that are written together. With SmolLM2-135M on one
thread of a shared Xeon core, float32: 63 tokens/s in rows of 16, 89 tokens/s in rows of 64, where plain forward passes
over text do 150 tokens/s. So its share of a calibration should be modest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from slimexport.errors import BadInputError, reason
from slimexport.texts.generated import Progress, write
from slimexport.texts.prompts import PROMPTS

if TYPE_CHECKING:
    import torch

ROW = 256  # tokens written in one go: a turn or two, and wide batches for few windows
BATCH = 64  # rows
NOTE = "answers sampled from the dense model itself, in its chat template"


def sample(
    model: Any,
    tokenizer: Any,
    sequences: int,
    length: int,
    seed: int,
    progress: Progress = lambda done, total, text: None,
) -> torch.Tensor:
    """int64 [sequences, length] of conversations one after another: temperature 1, no top-k, no top-p, seeded.

    An answer ends where the model ends it, and the next conversation follows; rows of 256 tokens (fewer for a model
    with a shorter context) are laid end to end and cut into sequences. `progress` is told of the tokens written.
    Raises BadInputError where the tokenizer has no chat template, and where the logits are not finite.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    begin = _conversations(tokenizer, generator)
    ends = _ends(model, tokenizer)
    total = sequences * length
    limit = getattr(model.config, "max_position_embeddings", None)

    def follow(token: int) -> list[int]:
        return next(begin) if token in ends else []

    row = min(ROW, total, limit if isinstance(limit, int) else ROW)
    rows = -(-total // row)  # rounded up
    batches: list[torch.Tensor] = []
    for first in range(0, rows, BATCH):
        count = min(BATCH, rows - first)
        step = _told(progress, first * row, count, total)
        batches.append(write(model, [next(begin) for _ in range(count)], row, generator, follow, step))
    return torch.cat(batches).flatten()[:total].view(sequences, length)


def ended(model: Any, tokenizer: Any, asked: int, tokens: int) -> list[bool]:
    """For each of our first `asked` prompts: whether the model ends its answer, greedy, within so many tokens, and
    without another mark of the template in it.

    Raises BadInputError where the tokenizer has no chat template, and where the logits are not finite.
    """
    if problem := unable(tokenizer):
        raise BadInputError(f"chat: {problem}.")
    openings = [_opening(tokenizer, prompt) for prompt in PROMPTS[:asked]]
    ends = _ends(model, tokenizer)
    marks = set(tokenizer.all_special_ids) - ends
    written = write(model, openings, max(map(len, openings)) + tokens, None)
    found = []
    for opening, row in zip(openings, written.tolist(), strict=True):
        answer = row[len(opening) : len(opening) + tokens]
        length = next((at for at, token in enumerate(answer) if token in ends), None)
        found.append(bool(length) and not marks & set(answer[:length]))
    return found


def unable(tokenizer: Any) -> str | None:
    """Why conversations cannot be written with this tokenizer; None where they can."""
    if not getattr(tokenizer, "chat_template", None):
        return "the model has no chat template"
    # A template is a program of the model's author: it can fail in any way.
    try:
        return None if _opening(tokenizer, PROMPTS[0]) else "the chat template makes no tokens"
    except Exception as error:
        return f"the chat template fails: {reason(error)}"


def _conversations(tokenizer: Any, generator: torch.Generator) -> Iterator[list[int]]:
    """Openings without end: all prompts in an order that the generator draws, and again."""
    import torch

    if problem := unable(tokenizer):
        raise BadInputError(f"chat: {problem}; use --calibration FILE.")
    openings = [_opening(tokenizer, PROMPTS[i]) for i in torch.randperm(len(PROMPTS), generator=generator).tolist()]
    while True:
        yield from openings


def _opening(tokenizer: Any, prompt: str) -> list[int]:
    """The token ids up to where the model's answer begins."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end an answer: the tokenizer's eos and those of the generation config."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = stated if isinstance(stated, list) else [stated]
    return {token for token in (*several, tokenizer.eos_token_id) if token is not None}


def _told(progress: Progress, before: int, rows: int, total: int) -> Callable[[int], None]:
    return lambda columns: progress(min(before + columns * rows, total), total, "tokens of conversation written")
