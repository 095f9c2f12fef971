"""Text that the model writes itself, for where no text may be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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

    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise BadInputError("The tokenizer has no bos or eos token to sample from: use --calibration FILE, not self.")
    generator = torch.Generator().manual_seed(seed)  # on the CPU, and not the global one: nobody else's draws change
    batches: list[torch.Tensor] = []
    for done in range(0, sequences, BATCH):
        ids = torch.full((min(BATCH, sequences - done), 1), start, dtype=torch.int64)
        batches.append(_sample_batch(model, ids, length, generator))
        progress(done + len(ids), sequences, "sequences sampled")
    return torch.cat(batches)


def _sample_batch(model: Any, ids: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    import torch

    columns, past = [ids], None
    with torch.inference_mode():
        while len(columns) < length:
            out = model(input_ids=columns[-1].to(model.device), past_key_values=past, use_cache=True)
            past = out.past_key_values
            probabilities = out.logits[:, -1].float().cpu().softmax(dim=-1)
            if not torch.isfinite(probabilities).all():
                raise BadInputError("The model's logits are not finite: try --dtype float32, or --calibration FILE.")
            columns.append(torch.multinomial(probabilities, 1, generator=generator))
    return torch.cat(columns, dim=1).clone()  # a clone made outside is no inference tensor
