"""Text that the model writes itself: from nothing (`sample`), and on from what is given to it (`write`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from slimexport.architectures.cache import cache_argument, cache_of
from slimexport.errors import BadInputError

if TYPE_CHECKING:
    import torch

BATCH = 16
NOTE = "sampled from the dense model itself; in the field this measured worse than real text: prefer a text of your own"

Progress = Callable[[int, int, str], None]


def sample(
    model: Any,
    tokenizer: Any,
    sequences: int,
    length: int,
    seed: int,
    progress: Progress = lambda done, total, text: None,
) -> torch.Tensor:
    """int64 [sequences, length] of the model's own text: temperature 1, no top-k, no top-p, KV cache, seeded.

    Every sequence begins with bos (or eos); an eos in the middle ends a document and the next one follows.
    Raises BadInputError where the tokenizer has neither, and where the logits are not finite.
    """
    import torch

    if problem := unable(tokenizer):
        raise BadInputError(f"{problem}: use --calibration FILE, not self.")
    start = _start(tokenizer)
    generator = torch.Generator().manual_seed(seed)  # on the CPU, and not the global one: nobody else's draws change
    batches: list[torch.Tensor] = []
    for done in range(0, sequences, BATCH):
        ids = write(model, [[start]] * min(BATCH, sequences - done), length, generator)
        batches.append(ids)
        progress(done + len(ids), sequences, "sequences sampled")
    return torch.cat(batches)


def unable(tokenizer: Any) -> str | None:
    """Why nothing can be sampled with this tokenizer; None where it can."""
    return None if _start(tokenizer) is not None else "The tokenizer has no bos or eos token to sample from"


def _start(tokenizer: Any) -> Any:
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def write(
    model: Any,
    beginnings: Sequence[Sequence[int]],
    length: int,
    generator: torch.Generator | None,
    follow: Callable[[int], Sequence[int]] = lambda token: (),
    step: Callable[[int], None] = lambda columns: None,
) -> torch.Tensor:
    """int64 [rows, length]: each row continues its beginning (one token at least), at temperature 1; with the likeliest
    tokens where there is no generator.

    `follow` is asked after every token that was drawn: what it returns comes next in that row, undrawn. Beginnings may
    differ in length: all rows go on token by token, the given ones where they have any left, so nothing is padded.
    `step` is told of the columns done. Raises BadInputError where the logits are not finite.
    """
    import torch

    cache = cache_argument(model)
    waiting = [deque(beginning[:length]) for beginning in beginnings]
    done = min(len(row) for row in waiting)
    columns, past = [torch.tensor([[row.popleft() for _ in range(done)] for row in waiting])], None
    with torch.inference_mode():
        while done < length:
            ids = columns[-1].to(model.device)
            out = model(input_ids=ids, **{cache: past}, use_cache=True, logits_to_keep=1)
            past = cache_of(out)
            probabilities = out.logits[:, -1].float().cpu().softmax(dim=-1)
            if not torch.isfinite(probabilities).all():
                raise BadInputError("The model's logits are not finite: try --dtype float32, or --calibration FILE.")
            if generator is None:
                column = probabilities.argmax(-1, keepdim=True)
            else:
                column = torch.multinomial(probabilities, 1, generator=generator)
            for i, row in enumerate(waiting):
                if row:
                    column[i] = row.popleft()
                else:
                    row.extend(follow(int(column[i])))
            columns.append(column)
            done += 1
            step(done)
    return torch.cat(columns, dim=1).clone()  # a clone made outside is no inference tensor
