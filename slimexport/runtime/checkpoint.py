"""Checkpoints in torch, as transformers runs them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slimexport.errors import BadInputError
from slimexport.providers import PROVIDERS
from slimexport.runtime.base import Decoder, default_threads, manifest_of

_NAMES = {torch.float32: "fp32", torch.float64: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


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
        from slimexport.checkpoint import load_weights

        self.directory = self.path = Path(directory)
        self.provider, self.threads = provider, threads or default_threads()
        device = torch_device(provider)
        torch.set_num_threads(self.threads)
        self.artifact = manifest_of(self.directory)
        started = time.perf_counter()
        self.model: Any = load_weights(self.directory).to(device)
        self.load_seconds = time.perf_counter() - started
        self.precision = _NAMES[self.model.dtype]
        config = self.model.config.get_text_config()
        self.vocab_size = int(config.vocab_size)
        self.max_positions = getattr(config, "max_position_embeddings", None)
        self.kv_bytes_per_token = self._bytes_of_cache(2) - self._bytes_of_cache(1)

    def forward(
        self,
        input_ids: NDArray[np.int64],
        past: TorchCache | None = None,
        attention_mask: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], TorchCache]:
        """See `Decoder`."""
        logits, grown = self._step(input_ids, past, attention_mask, keep=0)
        return logits, grown

    def last_logits(
        self,
        input_ids: NDArray[np.int64],
        past: TorchCache | None = None,
        attention_mask: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], TorchCache]:
        """See `Decoder`; where the mask pads on the right all logits are computed."""
        if attention_mask is None or attention_mask[:, -1].all():
            logits, grown = self._step(input_ids, past, attention_mask, keep=1)
            return logits[:, -1], grown
        logits, grown = self._step(input_ids, past, attention_mask, keep=0)
        new = np.asarray(attention_mask)[:, -np.asarray(input_ids).shape[1] :]
        last = new.shape[1] - 1 - new[:, ::-1].argmax(axis=1)
        return logits[np.arange(len(logits)), last], grown

    @torch.inference_mode()
    def _step(
        self, input_ids: NDArray[np.int64], past: TorchCache | None, mask: NDArray[np.int64] | None, *, keep: int
    ) -> tuple[NDArray[np.float32], TorchCache]:
        ids = np.asarray(input_ids)
        total = (ids.shape[-1] if ids.ndim else 0) + (past.length if past else 0)
        self.check_ids(ids, past.batch if past else None, total)
        given: dict[str, Any] = {"past_key_values": past.values if past else None, "use_cache": True}
        if mask is not None:
            self.check_mask(np.asarray(mask), (len(ids), total))
            given["attention_mask"] = self._tensor(mask)
            places = np.maximum(np.asarray(mask).cumsum(1) - 1, 0)[:, -ids.shape[1] :]
            given["position_ids"] = self._tensor(places)
        if keep:
            given["logits_to_keep"] = keep
        made = self.model(self._tensor(ids), **given)
        return made.logits.float().cpu().numpy(), TorchCache(made.past_key_values, len(ids), total)

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(self.model.device)

    def _bytes_of_cache(self, tokens: int) -> int:
        _, cache = self._step(np.zeros((1, tokens), np.int64), None, None, keep=1)
        held = [value for layer in cache.values.layers for value in vars(layer).values()]
        return sum(value.nbytes for value in held if isinstance(value, torch.Tensor))


def torch_device(provider: str) -> str:
    """Raises BadInputError for a provider that is none of torch's devices here."""
    device = PROVIDERS[provider].device if provider in ("cpu", "cuda") else None
    if device is None or (device == "cuda" and not torch.cuda.is_available()):
        why = "torch finds no CUDA device here" if device else "only ONNX Runtime has it"
        raise BadInputError(f"A checkpoint runs in torch on cpu or cuda, not on {provider}: {why}.")
    return device
