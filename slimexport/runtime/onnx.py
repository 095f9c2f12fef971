"""Graphs in ONNX Runtime. No other module opens a session on an exported decoder.

The graphs are those of `targets/`: `input_ids`, `attention_mask`, sometimes `position_ids`, one past key and one past
value per block in; logits and the grown cache out. One graph serves prefill, decode and chunk. The cache lives in
OrtValues and never passes through numpy. torch is imported only for what numpy cannot read (bfloat16, CUDA memory),
so that a process which measures the graph's memory holds nothing else.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimexport.errors import BadInputError, nearest
from slimexport.machine.cores import default_threads
from slimexport.providers import PROVIDERS
from slimexport.runtime.base import Decoder, manifest_of, positions_of
from slimexport.runtime.signature import read_signature

GRAPH = "model.onnx"


@dataclass(frozen=True)
class KVState:
    """A cache on the session's device: one OrtValue per cache input, [batch, kv_heads, length, head_dim] where it
    holds keys or values.

    One with a `capacity` has room for that many tokens, and each call writes its own into it: what was made from it
    before by other calls is overwritten then, while it itself stays what it was.
    """

    values: tuple[Any, ...]
    batch: int
    length: int
    capacity: int = 0
    binding: Any = None  # of one with a capacity: its buffers, bound once


class OnnxDecoder(Decoder):
    """An exported decoder in an ONNX Runtime session.

    Raises BadInputError when onnxruntime is missing, the directory holds no readable graph, the graph is not a decoder
    with a KV cache, or the provider asked for is not the one that would compute.
    """

    def __init__(
        self,
        directory: Path,
        provider: str = "cpu",
        threads: int | None = None,
        provider_options: Mapping[str, str] | None = None,
        *,
        mapped: bool = False,
    ):
        self.directory = Path(directory)
        self.path = self.directory / GRAPH
        self.provider = provider
        self.threads = threads or default_threads()
        if not self.path.is_file():
            raise BadInputError(f"{self.path} does not exist: not the directory of an ONNX export.")
        self.artifact = manifest_of(self.directory)
        self.max_positions = positions_of(self.directory)
        started = time.perf_counter()
        self._session = open_session(self.path, provider, self.threads, provider_options or {}, mapped=mapped)
        self.load_seconds = time.perf_counter() - started
        self._device = PROVIDERS[provider].device
        self.signature = read_signature(self._session, self.path, self.artifact)
        self.vocab_size = self.signature.vocab_size
        self.kv_bytes_per_token = self.signature.kv_bytes_per_token
        self.fixed_batch = self.signature.fixed_batch
        self.last_only = self.signature.all_logits is not None
        self.precision = self.artifact.precision if self.artifact else self.signature.float_precision
        self.shared_kv = self.artifact is not None and self.artifact.shared_kv

    @property
    def left_padding(self) -> bool:
        """Whether the graph is right with left padding; without a manifest nobody said so."""
        return self.artifact is not None and self.artifact.left_padding

    @property
    def placement(self) -> dict[str, dict[str, int]]:
        """ONNX Runtime's name of a provider -> the operators that run on it, and how many of each."""
        found: dict[str, Counter[str]] = {}
        for part in self._session.get_provider_graph_assignment_info():
            found.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
        return {name: dict(of.most_common()) for name, of in found.items()}

    # -------------------------------------------------------------------------------------------------- running

    def room(self, batch: int, tokens: int) -> KVState | None:
        """See `Decoder`; None where the graph cannot have past and present in one place."""
        if not self.shared_kv:
            return None
        values = self._empty_cache(batch, tokens)
        binding = self._session.io_binding()
        for cache, value in zip(self.signature.caches, values, strict=True):
            binding.bind_ortvalue_input(cache.past, value)
            binding.bind_ortvalue_output(cache.present, value)
        return KVState(values, batch, 0, tokens, binding)

    def _step(
        self, input_ids: NDArray[np.int64], past: KVState | None, mask: NDArray[np.int64] | None, *, last: bool
    ) -> tuple[NDArray[np.float32], KVState]:
        feeds, batch, total = self._token_feeds(input_ids, past, mask)
        if past and past.capacity:
            if total > past.capacity:
                raise BadInputError(f"{total} tokens are more than the {past.capacity} that there is room for.")
            binding = past.binding
        else:
            # A fresh binding each time: a kept one would offer the last call's outputs as this call's buffers.
            binding = self._session.io_binding()
            for cache, value in zip(
                self.signature.caches, past.values if past else self._empty_cache(batch), strict=True
            ):
                binding.bind_ortvalue_input(cache.past, value)
                binding.bind_output(cache.present, self._device)
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        if self.signature.all_logits:
            binding.bind_ortvalue_input(self.signature.all_logits, _scalar(not last))
        binding.bind_output(self.signature.logits, self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises a dozen types of its own
            shape = f"input_ids {list(input_ids.shape)} on a past of {past.length if past else 0} tokens"
            raise BadInputError(f"{self.path}: ONNX Runtime failed on {shape}: {_first_line(error)}") from error
        outputs = binding.get_outputs()  # in the order in which they were first bound
        if past and past.capacity:
            return _to_float32(outputs[-1], last), replace(past, length=total)
        return _to_float32(outputs[-1], last), KVState(tuple(outputs[:-1]), batch, total)

    def feeds(self, input_ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """All that a call without a cache is fed, logits of every token asked for: for a graph that is this one with
        something added to it."""
        feeds, batch, _ = self._token_feeds(input_ids, None, None)
        for cache in self.signature.caches:
            shape = [batch, *(size or 0 for size in cache.shape)]
            feeds[cache.past] = np.zeros(shape, np.float32 if cache.itemsize == 4 else np.float16)
        if self.signature.all_logits:
            feeds[self.signature.all_logits] = np.array(True)
        return feeds

    def _token_feeds(
        self, input_ids: NDArray[np.int64], past: KVState | None, mask: NDArray[np.int64] | None
    ) -> tuple[dict[str, NDArray[Any]], int, int]:
        """Checks the inputs; returns what to feed, the batch size, and the length after this call."""
        ids = np.asarray(input_ids)
        total = (ids.shape[-1] if ids.ndim else 0) + (past.length if past else 0)
        self.check_ids(ids, past.batch if past else None, total)
        batch, new = ids.shape
        if mask is None:
            full = np.ones((batch, total), np.int64)
            positions = np.broadcast_to(np.arange(total - new, total, dtype=np.int64), ids.shape)
        else:
            full = np.asarray(mask)
            self._check_mask(full, (batch, total))
            positions = np.maximum(full.cumsum(1) - 1, 0)[:, -new:]
        values = {"input_ids": ids, "attention_mask": full, "position_ids": positions}
        feeds = {
            name: np.ascontiguousarray(values[role], dtype) for role, (name, dtype) in self.signature.inputs.items()
        }
        return feeds, batch, total

    def _check_mask(self, mask: NDArray[Any], shape: tuple[int, int]) -> None:
        self.check_mask(mask, shape)
        if not self.left_padding and (np.diff(mask.astype(np.int8), axis=1) > 0).any():
            raise BadInputError(
                f"{self.path} is wrong with left padding (a 0 before a 1 in attention_mask): pad on the right."
            )

    def _empty_cache(self, batch: int, length: int = 0) -> tuple[Any, ...]:
        """Memory for the cache of `length` tokens; what is in it counts for nothing, but for states."""
        from onnxruntime import OrtValue

        shapes = [[batch, *(length if size is None else size for size in c.shape)] for c in self.signature.caches]
        empty = tuple(
            OrtValue.ortvalue_from_shape_and_type(shape, c.element, self._device)
            for shape, c in zip(shapes, self.signature.caches, strict=True)
        )
        for value, c in zip(empty, self.signature.caches, strict=True):
            if None not in c.shape:  # a state begins with zeros, and memory does not
                value.update_inplace(np.zeros(value.shape(), np.float32 if c.itemsize == 4 else np.float16))
        return empty


def require_provider(provider: str) -> None:
    """Raises BadInputError unless ONNX Runtime is installed and has `provider`: said before minutes of pruning."""
    if provider not in PROVIDERS:
        raise BadInputError(
            f"Unknown provider {provider!r}: known are {', '.join(PROVIDERS)}.{nearest(provider, PROVIDERS)}"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise BadInputError("onnxruntime is not installed: pip install 'slimexport[cpu]'") from error
    wanted = PROVIDERS[provider]
    if wanted.theirs not in onnxruntime.get_available_providers():
        raise BadInputError(
            f"Provider {provider} needs {wanted.theirs}, which the installed onnxruntime lacks: pip install "
            f"'{wanted.package}' in an environment without onnxruntime (they overwrite each other's files)."
        )


def open_session(
    path: Path, provider: str, threads: int, provider_options: Mapping[str, str], *, mapped: bool = False
) -> Any:
    """Opens `path` on exactly `provider`; ONNX Runtime itself would fall back to the CPU without an error.

    `mapped`: without copies of the weights in the order in which the processor likes to read them.
    """
    require_provider(provider)
    import onnxruntime

    wanted = PROVIDERS[provider].theirs
    if PROVIDERS[provider].device == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # finds the CUDA libraries that came as wheels (torch's)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors only: what matters is raised
    # Workers would go on spinning after a run, on the cores that the other session or torch needs next: torch's
    # log-softmax took 5 times as long. Decoding was not slower without.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if mapped:
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")  # see `placement`
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=[wanted], provider_options=[dict(provider_options)]
        )
    except Exception as error:  # onnxruntime raises a dozen types of its own
        raise BadInputError(f"{path}: ONNX Runtime cannot open it: {_first_line(error)}") from error
    if session.get_providers()[0] != wanted:
        raise BadInputError(f"{path}: asked for {wanted}, ONNX Runtime took {session.get_providers()[0]} instead.")
    return session


def _to_float32(value: Any, last: bool) -> NDArray[np.float32]:
    """OrtValue [b, t, vocab] -> float32; of the last position only if `last`."""
    rows = slice(-1, None) if last else slice(None)
    if value.device_name() == "cpu" and value.data_type() != "tensor(bfloat16)":
        array: NDArray[np.float32] = value.numpy()[:, rows].astype(np.float32, copy=False)
        return array
    import torch  # slices on the device, so that one row crosses the bus and not the whole prompt's

    return torch.from_dlpack(value)[:, rows].float().cpu().numpy()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300]


@functools.cache
def _scalar(value: bool) -> Any:
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(np.array(value))
