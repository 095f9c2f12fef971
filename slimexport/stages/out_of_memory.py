"""When the device runs out of memory: the same again with fewer tokens at once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from slimexport.config import RunConfig
from slimexport.errors import BadInputError, first_sentence
from slimexport.progress import Progress
from slimexport.pruning.forward import BATCH_TOKENS
from slimexport.pruning.states import Room

T = TypeVar("T")
FEWEST_TOKENS = 512  # below that it is not the batch that does not fit


def with_less(
    run: Callable[[Room], T],
    room: Room,
    progress: Progress,
    config: RunConfig,
    *,
    again: bool = True,
    less: str = "fewer --calibration-tokens, a shorter --sequence-length",
) -> T:
    """`run` in this room, and with half as many tokens in a forward call whenever the device runs out of memory.

    Raises BadInputError where it does so with FEWEST_TOKENS or one sequence as well, or at once if not `again`; `less`
    is what to give then.
    """
    length = config.sequence_length
    tokens = max(room.batch_tokens or BATCH_TOKENS[room.keep.device.type], length)
    fewest = max(FEWEST_TOKENS, length)
    while True:
        try:
            return run(room)
        except torch.OutOfMemoryError as error:
            reason = first_sentence(error)
        if not again or tokens <= fewest:
            limit = "" if room.keep.place != "device" or config.device_memory_limit else "--max-device-memory, "
            called = f", with {tokens} tokens in a forward call" if again else ""
            raise BadInputError(
                f"{room.keep.device} ran out of memory ({reason}){called}: give {limit}{less}, or --device cpu."
            )
        tokens = max(tokens // 2, fewest)
        room = replace(room, batch_tokens=tokens)
        gc.collect()
        if room.keep.device.type == "cuda":
            torch.cuda.empty_cache()
        progress.note(f"{room.keep.device} ran out of memory: going on with {tokens} tokens in a forward call")
