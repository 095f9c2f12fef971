"""GGUF files, in llama.cpp through llama-cpp-python, where that is installed."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slimexport.errors import BadInputError
from slimexport.runtime import TimedGreedy

if TYPE_CHECKING:
    from slimexport.bench.settings import Settings

kind = "gguf"


def find(path: Path) -> list[Path]:
    return [path] if path.suffix == ".gguf" and path.is_file() else []


def open_one(place: Path, name: str, settings: Settings) -> GgufSubject:
    return GgufSubject(place, name, settings)


class GgufSubject:
    """See `slimexport.bench.settings.Subject`."""

    kind = kind

    def __init__(self, place: Path, name: str, settings: Settings):
        try:
            from llama_cpp import Llama
        except ImportError:
            raise BadInputError(f"{place} needs llama.cpp: pip install llama-cpp-python") from None
        longest = settings.longest + 1
        threads = settings.resolved_threads
        try:
            self.model: Any = Llama(
                str(place), n_ctx=longest, n_batch=longest, n_threads=threads, n_threads_batch=threads,
                n_gpu_layers=-1 if settings.provider == "cuda" else 0, logits_all=False, verbose=False,
            )  # fmt: skip
        except ValueError as error:
            raise BadInputError(f"{place}: llama.cpp cannot open it: {error}") from error
        self.name = name
        self.precision = "gguf"
        self.vocabulary: int = self.model.n_vocab()
        self.max_positions: int | None = int(self.model.n_ctx_train()) if hasattr(self.model, "n_ctx_train") else None
        self.streamed_bytes: int | None = None  # the file may hold tables and experts that a token reads little of

    def timed_greedy(self, prompt_ids: NDArray[np.int64], steps: int) -> TimedGreedy:
        self.model.reset()
        tokens: list[int] = []
        given = prompt_ids.tolist()
        clock = [time.perf_counter()]
        for _ in range(steps + 1):
            self.model.eval(given)
            tokens.append(int(np.argmax(self.model.eval_logits[-1])))
            given = tokens[-1:]
            clock.append(time.perf_counter())
        seconds = [after - before for before, after in pairwise(clock)]
        return TimedGreedy(seconds[0], tuple(seconds[1:]), tuple(tokens))

    def timed_batch(self, prompts: NDArray[np.int64], steps: int) -> float | None:
        return None
