"""GGUF files in llama.cpp, called like graphs: logits of every token, on a cache of keys and values.

Only tokens that the mask does not mask are fed, each sequence's at positions counted from its own first one, so padding
on either side costs and changes nothing. Cache and attention are llama.cpp's defaults, both in float16; of a file that
is exported in float32, in float32. Nothing here imports torch.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slimexport.artifacts import ExportArtifact, is_quantised
from slimexport.errors import BadInputError
from slimexport.machine.cores import default_threads
from slimexport.runtime.base import Decoder, manifest_of
from slimexport.runtime.llama_api import LlamaContext, LlamaModel

MODEL = "model.gguf"
_BYTES = {True: 4, False: 2}  # of an entry of the cache that is full or not
_BITS = {  # with scales and minima; of the cache that goes with each
    "fp32": (32.0, 32.0, 32.0), "fp16": (16.0, 16.0, 16.0), "bf16": (16.0, 16.0, 16.0),
    "int8": (8.5, 8.5, 16.0), "int4": (5.0, 5.0, 16.0), "int4-mixed": (5.0, 8.5, 16.0),
}  # fmt: skip

_STRAYS = 0.05
"""Of positions of random tokens, in a quantised file. llama.cpp rounds activations to 8 bits and, for Q4_1, the sum of
32 of them to float16. Where one activation is huge, as at a few tokens of many models, that is coarse enough to turn
the prediction there into another one: of SmolLM2-135M, pruned, 5 of 96 positions are beyond tolerance in Q4_1, 4 in
Q8_0, none in Q4_0. On text Q4_1 is the better one by far (KL 0.15 and 0.57, of which rounding activations makes 0.004).
A wrong file is wrong at all positions, and its content is held to the model without such noise (gguf/target.py).
"""


class _Lease:
    """A context in use. `step` counts the calls that went into it; it goes back when nobody holds the lease."""

    def __init__(self, context: LlamaContext, free: list[LlamaContext]):
        self.context, self.step = context, 0
        context.clear()
        weakref.finalize(self, free.append, context)


@dataclass(frozen=True)
class LlamaCache:
    """What was fed so far. A call that it is passed to goes on in the same memory: it can be passed to one only."""

    lease: _Lease
    step: int
    batch: int
    length: int  # columns of the mask
    fed: NDArray[np.int64]  # tokens of each sequence, [b]


class LlamaCppDecoder(Decoder):
    """`model.gguf` of an exported directory, or any GGUF file of a decoder.

    Raises BadInputError where xllamacpp is missing, llama.cpp cannot open the file, or the provider is not cpu.
    """

    last_only = True

    def __init__(self, place: Path, provider: str = "cpu", threads: int | None = None):
        place = Path(place)
        self.path = place / MODEL if place.is_dir() else place
        self.directory = self.path.parent
        if provider != "cpu":
            raise BadInputError(f"{self.path} runs in llama.cpp on the CPU here, not on {provider}.")
        self.provider, self.threads = provider, threads or default_threads()
        self.artifact: ExportArtifact | None = manifest_of(self.directory) if place.is_dir() else None
        started = time.perf_counter()
        self.model = LlamaModel(self.path)
        self.precision = self.artifact.precision if self.artifact else _stored(self.model)
        self.bits = _BITS.get(self.precision)
        self.strays = _STRAYS if is_quantised(self.precision) else 0.0
        self._full = self.precision == "fp32"
        self._free: list[LlamaContext] = []
        self._free.append(self.model.context(1, 1, self.threads, full=self._full))
        self.load_seconds = time.perf_counter() - started
        self.vocab_size = self.model.vocab_size
        self.max_positions = self.model.positions or None
        self.kv_bytes_per_token = self._bytes_of_cache()

    def room(self, batch: int, tokens: int) -> LlamaCache:
        """An empty cache of that size. Raises BadInputError for more tokens than the model has positions."""
        if self.max_positions is not None:
            tokens = min(tokens, self.max_positions)
        return LlamaCache(self._lease(batch, tokens), 0, batch, 0, np.zeros(batch, np.int64))

    def _step(
        self, input_ids: NDArray[np.int64], past: LlamaCache | None, mask: NDArray[np.int64] | None, *, last: bool
    ) -> tuple[NDArray[np.float32], LlamaCache]:
        """See `Decoder`. Logits of masked tokens are 0."""
        ids = np.asarray(input_ids)
        total = (ids.shape[-1] if ids.ndim else 0) + (past.length if past else 0)
        self.check_ids(ids, past.batch if past else None, total)
        batch, count = ids.shape
        kept = np.ones(ids.shape, bool) if mask is None else self._kept(np.asarray(mask), past, batch, total, count)
        past = self._with_room(past, batch, kept)
        new = kept.sum(axis=1)
        rows, columns = np.nonzero(kept)
        positions = past.fed[rows] + kept.cumsum(axis=1)[rows, columns] - 1
        ends = count - 1 - kept[:, ::-1].argmax(axis=1)
        wanted = columns == ends[rows] if last else np.ones(len(rows), bool)
        found = past.lease.context.decode(ids[rows, columns], positions, rows, wanted)
        past.lease.step += 1
        grown = LlamaCache(past.lease, past.lease.step, batch, total, past.fed + new)
        if len(found) == batch * (1 if last else count):
            return found.reshape(batch, -1, self.model.vocab_size), grown
        logits = np.zeros((batch, 1 if last else count, self.model.vocab_size), np.float32)
        logits[rows[wanted], 0 if last else columns] = found
        return logits, grown

    def _kept(
        self, mask: NDArray[np.int64], past: LlamaCache | None, batch: int, total: int, count: int
    ) -> NDArray[np.bool_]:
        """Which of the new tokens are fed, bool [b, t]."""
        self.check_mask(mask, (batch, total))
        if past is not None and not np.array_equal(mask[:, :-count].sum(axis=1), past.fed):
            raise BadInputError("attention_mask masks tokens that are in the cache already.")
        kept = mask[:, -count:] == 1
        if not kept.any(axis=1).all():
            raise BadInputError("attention_mask must leave a new token in every row.")
        return kept

    def _with_room(self, past: LlamaCache | None, batch: int, kept: NDArray[np.bool_]) -> LlamaCache:
        """`past`, or an empty cache, with memory for the tokens that are `kept`; moved where it had too little."""
        new = kept.sum(axis=1)
        if past is None:
            return self.room(batch, int(new.max()))
        if past.step != past.lease.step:
            raise BadInputError("This cache was passed to another call already, which went on in its memory.")
        tokens = int((past.fed + new).max())
        if tokens <= past.lease.context.capacity:
            return past
        larger = self._lease(batch, max(tokens, 2 * past.lease.context.capacity))
        past.lease.context.copy_to(larger.context, batch)
        return LlamaCache(larger, 0, batch, past.length, past.fed)

    def _lease(self, batch: int, tokens: int) -> _Lease:
        """Of the smallest free context that is large enough, or a new one in place of all that are free."""
        fitting = [c for c in self._free if c.sequences == batch and c.capacity >= tokens]
        if fitting:
            found = min(fitting, key=lambda context: context.capacity)
            self._free.remove(found)
        else:
            self._free.clear()
            found = self.model.context(tokens, batch, self.threads, full=self._full)
        return _Lease(found, self._free)

    def _bytes_of_cache(self) -> int:
        """From the manifest; of another's file what the state of a sequence grows by, some bytes of which are the
        position."""
        if self.artifact:
            return 2 * sum(self.artifact.kv_heads) * self.artifact.head_dim * _BYTES[self._full]
        cache: LlamaCache | None = None
        sizes = []
        for _ in range(2):
            _, cache = self._step(np.zeros((1, 1), np.int64), cache, None, last=True)
            sizes.append(cache.lease.context.state_bytes(0))
        return sizes[1] - sizes[0]


def _stored(model: LlamaModel) -> str:
    """The kind of most of its tensors, as the file says: Q4_1."""
    from gguf import LlamaFileType

    said = model.metadata("general.file_type")
    try:
        return LlamaFileType(int(said or "")).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return "gguf"
