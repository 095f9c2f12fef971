"""What every decoder does, whoever computes its logits: greedy tokens, and the clock beside them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimexport.artifacts import MANIFEST, ExportArtifact, from_dict, read_json
from slimexport.errors import BadInputError


@dataclass(frozen=True)
class Greedy:
    """Greedy tokens, int64 [steps], and the logit gap between first and second choice, float32 [steps]."""

    tokens: NDArray[np.int64]
    margins: NDArray[np.float32]


Step = tuple[float, int]
"""Seconds of a call, and the token that it gave."""


@dataclass(frozen=True)
class TimedGreedy:
    """Seconds to the first token, seconds of each further token, and the tokens (one more than `token_seconds`)."""

    @classmethod
    def of(cls, steps: Iterable[Step]) -> TimedGreedy:
        (first, *rest), tokens = zip(*steps, strict=True)
        return cls(first, tuple(rest), tokens)

    ttft_seconds: float
    token_seconds: tuple[float, ...]
    tokens: tuple[int, ...]


DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Float precision -> torch's name of it."""


def precision_of(dtype: Any) -> str:
    """The precision of a torch dtype; float64 counts as fp32."""
    name = str(dtype).removeprefix("torch.").replace("float64", "float32")
    return next(precision for precision, known in DTYPES.items() if known == name)


def is_checkpoint(directory: Path) -> bool:
    """Whether it holds a config and weights."""
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


Bits = tuple[float, float, float]
"""Read for an entry of the blocks' matrices, of lm_head, and of the cache."""


class Decoder(ABC):
    """A decoder in `directory` that was loaded and can be called.

    A cache is what a call returned beside its logits; it goes into the next call as `past` and is of no other use.
    """

    directory: Path
    path: Path  # what an error is about
    provider: str
    threads: int
    artifact: ExportArtifact | None  # the manifest, where there is one
    load_seconds: float
    max_positions: int | None  # None: nobody said
    vocab_size: int | None  # None: nobody said
    precision: str
    kv_bytes_per_token: int  # what one more token adds to the cache
    fixed_batch: int | None = None  # None: any
    bits: Bits | None = None  # None: those of a graph of that precision (verification/latency.py)
    strays: float = 0.0  # share of positions of which verification/numerics.py expects nothing
    last_only: bool  # `last_logits` computes no others, and knows which is last where the mask pads on the right

    # ---------------------------------------------------------------------------------------------- its own

    @abstractmethod
    def _step(
        self, input_ids: NDArray[np.int64], past: Any, mask: NDArray[np.int64] | None, *, last: bool
    ) -> tuple[NDArray[np.float32], Any]:
        """Logits and cache of one call. With `last` the last row of logits, [:, -1], is that of each sequence's last
        token, and there need be no other; else they are of every token."""

    def room(self, batch: int, tokens: int) -> Any:
        """An empty cache with memory for `tokens`, so that no call has to copy it; None where there is no such thing.
        Pass it as the `past` of the first call."""
        return None

    @property
    def placement(self) -> dict[str, dict[str, int]]:
        """Name of a provider -> the operators that run on it, and how many of each."""
        return {}

    # ---------------------------------------------------------------------------------------------- of all

    def forward(
        self, input_ids: NDArray[np.int64], past: Any = None, attention_mask: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float32], Any]:
        """Logits of every token, float32 [b, t, vocab] (read-only: they may share memory), and the cache after them.

        `input_ids` is int64 [b, t]; `attention_mask` int64 [b, past + t], ones by default. Raises BadInputError for
        impossible inputs, and for left padding where a graph is silently wrong with it.
        """
        return self._step(input_ids, past, attention_mask, last=False)

    def last_logits(
        self, input_ids: NDArray[np.int64], past: Any = None, attention_mask: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float32], Any]:
        """Like `forward`, for the last token of each sequence alone: logits are float32 [b, vocab]. Which one is last
        where the mask pads on the right only a decoder with `last_only` knows."""
        logits, grown = self._step(input_ids, past, attention_mask, last=True)
        return logits[:, -1], grown

    def greedy(self, prompt_ids: NDArray[np.int64], steps: int) -> Greedy:
        """Decodes `steps` tokens greedily after `prompt_ids` int64 [t]; equal logits go to the lowest token id."""
        tokens, margins = np.empty(steps, np.int64), np.empty(steps, np.float32)
        ids = np.asarray(prompt_ids, np.int64)[None]
        past = self.room(1, ids.shape[1] + steps)
        for step in range(steps):
            logits, past = self.last_logits(ids, past)
            row = logits[0]
            tokens[step] = token = int(row.argmax())
            margins[step] = row[token] - np.partition(row, -2)[-2]
            ids = np.array([[token]], np.int64)
        return Greedy(tokens, margins)

    def stepped(self, prompt_ids: NDArray[np.int64], steps: int) -> Iterator[Step]:
        """Like `greedy`, one call at a time: the prefill (TTFT) and `steps` further tokens.

        The clock runs from token ids on the host to the next token there, and stands still between calls, so that
        several models can take turns. Memory for the cache is there before it starts, as it is in a server.
        """
        ids = np.asarray(prompt_ids, np.int64)[None]
        past = self.room(1, ids.shape[1] + steps)
        for _ in range(steps + 1):
            started = time.perf_counter()
            logits, past = self.last_logits(ids, past)
            token = int(logits[0].argmax())
            ids = np.array([[token]], np.int64)
            yield time.perf_counter() - started, token

    def timed_greedy(self, prompt_ids: NDArray[np.int64], steps: int) -> TimedGreedy:
        """All of `stepped`."""
        return TimedGreedy.of(self.stepped(prompt_ids, steps))

    def timed_batch(self, prompts: NDArray[np.int64], steps: int) -> float | None:
        """Seconds of `steps` further greedy tokens for each of several prompts int64 [b, t], their prefill not
        counted; None where this batch size cannot be."""
        batch, length = prompts.shape
        if self.fixed_batch not in (None, batch):
            return None
        logits, past = self.last_logits(prompts, self.room(batch, length + steps))
        ids = logits.argmax(-1)[:, None]
        started = time.perf_counter()
        for _ in range(steps):
            logits, past = self.last_logits(ids, past)
            ids = logits.argmax(-1)[:, None]
        return time.perf_counter() - started

    # ------------------------------------------------------------------------------------------ what all refuse

    def check_ids(self, ids: NDArray[Any], past_batch: int | None, total: int) -> None:
        """Raises BadInputError for token ids that cannot be fed after a cache of `past_batch` sequences."""
        if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
            raise BadInputError(f"input_ids must be integers [batch, tokens], not {ids.dtype} {list(ids.shape)}.")
        batch = len(ids)
        if self.fixed_batch not in (None, batch) or past_batch not in (None, batch):
            wanted = past_batch or self.fixed_batch
            raise BadInputError(f"input_ids has batch {batch}, {self.path} and its cache need {wanted}.")
        if ids.min() < 0 or (self.vocab_size is not None and ids.max() >= self.vocab_size):
            raise BadInputError(f"input_ids reach from {ids.min()} to {ids.max()}: vocabulary is {self.vocab_size}.")
        if self.max_positions is not None and total > self.max_positions:
            raise BadInputError(f"{total} tokens are more than the {self.max_positions} positions of the model.")

    @staticmethod
    def check_mask(mask: NDArray[Any], shape: tuple[int, int]) -> None:
        """Raises BadInputError for a mask that is not one of `shape`."""
        if mask.shape != shape or not np.isin(mask, (0, 1)).all() or not mask.any(axis=1).all():
            raise BadInputError(f"attention_mask must be 0 and 1, {list(shape)}, with a 1 in every row.")


def manifest_of(directory: Path) -> ExportArtifact | None:
    """The manifest in `directory`, where there is one; BadInputError for one that is not valid."""
    path = directory / MANIFEST
    return from_dict(ExportArtifact, read_json(path), str(path)) if path.exists() else None


def positions_of(directory: Path) -> int | None:
    """The model's positions from the config.json beside it, if there is one."""
    path = directory / "config.json"
    if not path.exists():
        return None
    config = read_json(path)
    for key in ("max_position_embeddings", "n_positions"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return None
