"""Hugging Face directories, in torch as transformers runs them: what a graph has to be faster than."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slimexport.run_directory import CHECKPOINT
from slimexport.runtime import TimedGreedy

if TYPE_CHECKING:
    from slimexport.bench.settings import Settings

kind = "transformers"


def find(path: Path) -> list[Path]:
    """The directory with config and weights; of a run directory that has no graph yet, its checkpoint."""
    for place in (path, path / CHECKPOINT):
        if (place / "config.json").is_file() and any(place.glob("*.safetensors")):
            return [place]
    return []


def open_one(place: Path, name: str, settings: Settings) -> TransformersSubject:
    return TransformersSubject(place, name, settings)


class TransformersSubject:
    """See `slimexport.bench.settings.Subject`."""

    kind = kind

    def __init__(self, place: Path, name: str, settings: Settings):
        import torch

        from slimexport.checkpoint import load

        torch.set_num_threads(settings.resolved_threads)
        self.name = name
        self.model: Any = load(place)[0].eval()
        if settings.provider == "cuda":
            self.model = self.model.to("cuda")
        elif self.model.dtype == torch.float16:  # the CPU's kernels for it are made for storage, not for speed
            self.model = self.model.float()
        self.precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.model.dtype]
        config = self.model.config.get_text_config()
        self.vocabulary: int = config.vocab_size
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        tables = 0 if config.tie_word_embeddings else self.model.get_input_embeddings().weight.nbytes
        self.streamed_bytes: int | None = sum(p.nbytes for p in self.model.parameters()) - tables

    def timed_greedy(self, prompt_ids: NDArray[np.int64], steps: int) -> TimedGreedy:
        tokens, clock = self._decode(prompt_ids[None], steps)
        seconds = [after - before for before, after in pairwise(clock)]
        return TimedGreedy(seconds[0], tuple(seconds[1:]), tuple(int(row[0]) for row in tokens))

    def timed_batch(self, prompts: NDArray[np.int64], steps: int) -> float | None:
        _, clock = self._decode(prompts, steps)
        return clock[-1] - clock[1]

    def _decode(self, prompts: NDArray[np.int64], steps: int) -> tuple[list[NDArray[np.int64]], list[float]]:
        """Greedy tokens [steps + 1][b], and the clock before the first and after each."""
        import torch
        from transformers import DynamicCache

        ids = torch.from_numpy(prompts).to(self.model.device)
        cache: DynamicCache = DynamicCache()
        tokens, clock = [], [time.perf_counter()]
        with torch.inference_mode():
            for _ in range(steps + 1):
                logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                ids = logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(ids[:, 0].cpu().numpy())
                clock.append(time.perf_counter())
        return tokens, clock
