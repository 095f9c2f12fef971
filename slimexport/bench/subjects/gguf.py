"""GGUF files, in llama.cpp: through xllamacpp, or llama-cpp-python where only that is installed.

Every time is the wall clock's, read after each token is known in Python, as for graphs; nothing is kept from one prompt
to the next, so a prefill computes all of its tokens.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slimexport.errors import BadInputError
from slimexport.run_directory import exports_in
from slimexport.runtime import MODEL, LlamaCppDecoder, Step
from slimexport.runtime.llama_api import INSTALL

if TYPE_CHECKING:
    from slimexport.bench.settings import Settings, Subject

kind = "gguf"


def find(path: Path) -> list[Path]:
    """A file, or what holds `model.gguf`: an exported directory, or of a run directory every one and the baselines."""
    if path.is_file():
        return [path] if path.suffix == ".gguf" else []
    return exports_in(path, MODEL)


def open_one(place: Path, name: str, settings: Settings) -> Subject:
    if importlib.util.find_spec("xllamacpp"):
        return GgufSubject(place, name, settings)
    if importlib.util.find_spec("llama_cpp"):
        return LlamaCppPythonSubject(place, name, settings)
    raise BadInputError(f"{place} needs llama.cpp: {INSTALL}")


class GgufSubject(LlamaCppDecoder):
    """See `slimexport.bench.settings.Subject`."""

    kind = kind

    def __init__(self, place: Path, name: str, settings: Settings):
        super().__init__(place, settings.provider, settings.resolved_threads)
        self.name = name
        assert self.vocab_size is not None
        self.vocabulary: int = self.vocab_size
        self.streamed_bytes: int | None = None  # the file may hold tables and experts that a token reads little of


class LlamaCppPythonSubject:
    """See `slimexport.bench.settings.Subject`."""

    kind = kind

    def __init__(self, place: Path, name: str, settings: Settings):
        from llama_cpp import Llama

        path = place / MODEL if place.is_dir() else place
        longest = settings.longest + 1
        threads = settings.resolved_threads
        try:
            self.model: Any = Llama(
                str(path), n_ctx=longest, n_batch=longest, n_threads=threads, n_threads_batch=threads,
                n_gpu_layers=-1 if settings.provider == "cuda" else 0, logits_all=False, verbose=False,
            )  # fmt: skip
        except ValueError as error:
            raise BadInputError(f"{path}: llama.cpp cannot open it: {error}") from error
        self.name = name
        self.precision = "gguf"
        self.vocabulary: int = self.model.n_vocab()
        self.max_positions: int | None = int(self.model.n_ctx_train()) if hasattr(self.model, "n_ctx_train") else None
        self.streamed_bytes: int | None = None

    def stepped(self, prompt_ids: NDArray[np.int64], steps: int) -> Iterator[Step]:
        self.model.reset()
        given = prompt_ids.tolist()
        for _ in range(steps + 1):
            started = time.perf_counter()
            self.model.eval(given)
            given = [int(np.argmax(self.model.eval_logits[-1]))]
            yield time.perf_counter() - started, given[0]

    def timed_batch(self, prompts: NDArray[np.int64], steps: int) -> float | None:
        return None
