"""What both models go on with after the same text: a few lines that people can judge for themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from slimexport.artifacts import Continuation
from slimexport.runtime import Decoder

PROMPT, STEPS = 32, 40  # tokens

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text."""


def continuations(
    shrunk: Decoder, dense: Decoder | None, text: NDArray[np.int64], count: int, decode: Decode
) -> tuple[Continuation, ...]:
    """Greedy tokens of both after `count` places of `text` int64 [n] that lie evenly apart; fewer where it is short."""
    length = min(PROMPT, len(text))
    room = min((d.max_positions for d in (shrunk, dense) if d and d.max_positions is not None), default=10**9)
    length, steps = min(length, room - 1), min(STEPS, room - length)
    if length < 1 or steps < 1:
        return ()
    starts = sorted({int(start) for start in np.linspace(0, len(text) - length, count + 1)[:-1]}) if count else []
    made = []
    for start in starts:
        prompt = text[start : start + length]
        own = shrunk.greedy(prompt, steps).tokens.tolist()
        other = dense.greedy(prompt, steps).tokens.tolist() if dense else None
        same = next((i for i, (a, b) in enumerate(zip(own, other or own, strict=True)) if a != b), steps)
        made.append(
            Continuation(
                prompt=decode(prompt.tolist()),
                shrunk=decode(own),
                dense=None if other is None else decode(other),
                tokens=steps,
                same=same if other is not None else 0,
            )
        )
    return tuple(made)
