"""Running what was exported, with a KV cache: graphs in ONNX Runtime, GGUF files in llama.cpp,
checkpoints in torch.

Nothing here imports torch before it is needed, so that a process which measures the memory of a graph holds nothing
else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from slimexport.errors import BadInputError
from slimexport.runtime.base import Decoder, Greedy, Step, TimedGreedy, is_checkpoint
from slimexport.runtime.checkpoint import CheckpointDecoder
from slimexport.runtime.llama_cpp import MODEL, LlamaCppDecoder
from slimexport.runtime.onnx import GRAPH, KVState, OnnxDecoder, require_provider

__all__ = [
    "GRAPH", "MODEL", "CheckpointDecoder", "Decoder", "Greedy", "KVState", "LlamaCppDecoder", "OnnxDecoder",
    "Step", "TimedGreedy", "is_checkpoint", "open_decoder", "require_provider",
]  # fmt: skip


def open_decoder(
    directory: Path,
    provider: str = "cpu",
    threads: int | None = None,
    provider_options: Mapping[str, str] | None = None,
    *,
    mapped: bool = False,
) -> Decoder:
    """Opens whatever was exported to `directory`. Raises BadInputError where that is nothing, or cannot be opened.

    `mapped`: weights of a graph are used as they lie in the file, which is slower, and need not fit into memory.
    """
    directory = Path(directory)
    if (directory / GRAPH).is_file():
        return OnnxDecoder(directory, provider, threads, provider_options, mapped=mapped)
    if (directory / MODEL).is_file():
        return LlamaCppDecoder(directory, provider, threads)
    if is_checkpoint(directory):
        return CheckpointDecoder(directory, provider, threads)
    raise BadInputError(f"{directory} holds neither {GRAPH}, {MODEL} nor a checkpoint.")
