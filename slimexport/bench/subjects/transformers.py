"""Hugging Face directories, in torch as transformers runs them: what a graph has to be faster than."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slimexport.bench.subjects.onnx import has_experts
from slimexport.run_directory import CHECKPOINTS
from slimexport.runtime import CheckpointDecoder, is_checkpoint

if TYPE_CHECKING:
    from slimexport.bench.settings import Settings

kind = "transformers"


def find(path: Path) -> list[Path]:
    """The directory with config and weights; of a run directory that has no graph yet, its checkpoint."""
    for place in (path, *(path / name for name in CHECKPOINTS)):
        if is_checkpoint(place):
            return [place]
    return []


def open_one(place: Path, name: str, settings: Settings) -> TransformersSubject:
    return TransformersSubject(place, name, settings)


class TransformersSubject(CheckpointDecoder):
    """See `slimexport.bench.settings.Subject`."""

    kind = kind

    def __init__(self, place: Path, name: str, settings: Settings):
        super().__init__(place, settings.provider, settings.resolved_threads)
        if settings.provider == "cpu" and self.precision == "fp16":
            self.model, self.precision = self.model.float(), "fp32"  # the CPU's kernels for it are not made for speed
        self.name = name
        self.vocabulary = self.vocab_size or 256
        tied = self.model.config.get_text_config().tie_word_embeddings
        tables = 0 if tied else self.model.get_input_embeddings().weight.nbytes
        weights = sum(p.nbytes for p in self.model.parameters()) - tables
        self.streamed_bytes: int | None = None if has_experts(self.directory) else weights
