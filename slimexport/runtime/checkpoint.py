"""Checkpoints in torch, as transformers runs them. torch is imported only where one is opened."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slimexport.architectures.cache import cache_argument, cache_of
from slimexport.errors import BadInputError
from slimexport.machine.cores import default_threads
from slimexport.providers import PROVIDERS
from slimexport.runtime.base import Decoder, manifest_of, precision_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TorchCache:
    """A cache of transformers; the call that it is passed to changes it."""

    values: Any
    batch: int
    length: int


class CheckpointDecoder(Decoder):
    """The model of a Hugging Face directory, on the CPU or on CUDA.

    Raises BadInputError where the directory holds no checkpoint, or the provider is none that torch has.
    """

    last_only = True

    def __init__(self, directory: Path, provider: str = "cpu", threads: int | None = None):
        import torch

        from slimexport.checkpoint import load_weights

        self.directory = self.path = Path(directory)
        self.provider, self.threads = provider, threads or default_threads()
        device = torch_device(provider)
        torch.set_num_threads(self.threads)
        self.artifact = manifest_of(self.directory)
        started = time.perf_counter()
        self.model: Any = load_weights(self.directory).to(device)
        self.load_seconds = time.perf_counter() - started
        self._cache = cache_argument(self.model)
        self.precision = precision_of(self.model.dtype)
        config = self.model.config.get_text_config()
        self.vocab_size = int(config.vocab_size)
        self.max_positions = getattr(config, "max_position_embeddings", None)
        self.kv_bytes_per_token = self._bytes_of_cache(2) - self._bytes_of_cache(1)

    def _step(
        self, input_ids: NDArray[np.int64], past: TorchCache | None, mask: NDArray[np.int64] | None, *, last: bool
    ) -> tuple[NDArray[np.float32], TorchCache]:
        """See `Decoder`; where the mask pads on the right all logits are computed."""
        import torch

        ids = np.asarray(input_ids)
        total = (ids.shape[-1] if ids.ndim else 0) + (past.length if past else 0)
        self.check_ids(ids, past.batch if past else None, total)
        given: dict[str, Any] = {self._cache: past.values if past else None, "use_cache": True}
        padded = False
        if mask is not None:
            mask = np.asarray(mask)
            self.check_mask(mask, (len(ids), total))
            given["attention_mask"] = self._tensor(mask)
            given["position_ids"] = self._tensor(np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :])
            padded = not mask[:, -1].all()
        if last and not padded:
            given["logits_to_keep"] = 1
        with torch.inference_mode():
            made = self.model(self._tensor(ids), **given)
        logits = made.logits.float().cpu().numpy()
        if last and padded:
            assert mask is not None
            new = mask[:, -ids.shape[1] :]
            kept = new.shape[1] - 1 - new[:, ::-1].argmax(axis=1)
            logits = logits[np.arange(len(ids)), kept][:, None]
        return logits, TorchCache(cache_of(made), len(ids), total)

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(self.model.device)

    def _bytes_of_cache(self, tokens: int) -> int:
        import torch

        _, cache = self.last_logits(np.zeros((1, tokens), np.int64))
        held = [value for layer in cache.values.layers for value in vars(layer).values()]
        return sum(value.nbytes for value in held if isinstance(value, torch.Tensor))


def torch_device(provider: str) -> str:
    """Raises BadInputError for a provider that is none of torch's devices here."""
    import torch

    device = PROVIDERS[provider].device if provider in ("cpu", "cuda") else None
    if device is None or (device == "cuda" and not torch.cuda.is_available()):
        why = "torch finds no CUDA device here" if device else "only ONNX Runtime has it"
        raise BadInputError(f"A checkpoint runs in torch on cpu or cuda, not on {provider}: {why}.")
    return device
