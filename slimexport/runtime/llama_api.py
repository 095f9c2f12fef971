"""llama.cpp's own C functions (llama.h), which the extension module in the wheel `xllamacpp` holds and shows.

xllamacpp's Python interface is that of a server: of a prompt it gives the last token's most probable followers. Whether
a file computes what a model computes takes the logits of every token, so the functions beneath are called here. The
structs of settings change from version to version of llama.cpp; nothing here knows their fields. Settings are made by
name, through xllamacpp's `CommonParams`, llama.cpp turns them into its structs, and those are passed on unread. What
came out of it is asked back (`llama_n_ctx` and the like), so that another layout is an error and no wrong number.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimexport.errors import BadInputError

KNOWN = "2026.10.11549"  # and 2026.8.10229, 2026.9.11063
INSTALL = "pip install 'slimexport[gguf]'"
BATCH = 512
"""Tokens that one call of llama.cpp takes; more go in turns."""

_CHUNK = 256  # llama.cpp rounds the cache up to a multiple of this
_Pointer = ctypes.c_void_p


class _Settings(ctypes.Structure):
    """Room for one of llama.cpp's structs of settings (some 100 to 200 bytes), whatever is in it."""

    _fields_ = (("bytes", ctypes.c_uint8 * 2048),)


class _Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32), ("token", _Pointer), ("embd", _Pointer), ("pos", _Pointer),
        ("n_seq_id", _Pointer), ("seq_id", _Pointer), ("logits", _Pointer),
    )  # fmt: skip


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _Pointer)
_CONTEXT_SETTINGS = "_Z30common_context_params_to_llamaRK13common_params"
_MODEL_SETTINGS = "_Z28common_model_params_to_llamaR13common_params"
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    _CONTEXT_SETTINGS: (_Settings, (_Pointer,)),
    _MODEL_SETTINGS: (_Settings, (_Pointer,)),
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_Log, _Pointer)),
    "llama_model_load_from_file": (_Pointer, (ctypes.c_char_p, _Settings)),
    "llama_model_free": (None, (_Pointer,)),
    "llama_model_n_ctx_train": (ctypes.c_int32, (_Pointer,)),
    "llama_model_meta_val_str": (ctypes.c_int32, (_Pointer, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)),
    "llama_model_get_vocab": (_Pointer, (_Pointer,)),
    "llama_vocab_n_tokens": (ctypes.c_int32, (_Pointer,)),
    "llama_tokenize": (
        ctypes.c_int32,
        (_Pointer, ctypes.c_char_p, ctypes.c_int32, _Pointer, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool),
    ),
    "llama_init_from_model": (_Pointer, (_Pointer, _Settings)),
    "llama_free": (None, (_Pointer,)),
    "llama_n_ctx_seq": (ctypes.c_uint32, (_Pointer,)),
    "llama_n_batch": (ctypes.c_uint32, (_Pointer,)),
    "llama_n_seq_max": (ctypes.c_uint32, (_Pointer,)),
    "llama_n_threads": (ctypes.c_int32, (_Pointer,)),
    "llama_decode": (ctypes.c_int32, (_Pointer, _Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (_Pointer,)),
    "llama_get_memory": (_Pointer, (_Pointer,)),
    "llama_memory_clear": (None, (_Pointer, ctypes.c_bool)),
    "llama_state_seq_get_size": (ctypes.c_size_t, (_Pointer, ctypes.c_int32)),
    "llama_state_seq_get_data": (ctypes.c_size_t, (_Pointer, _Pointer, ctypes.c_size_t, ctypes.c_int32)),
    "llama_state_seq_set_data": (ctypes.c_size_t, (_Pointer, _Pointer, ctypes.c_size_t, ctypes.c_int32)),
}  # fmt: skip


def require() -> None:
    """Raises BadInputError where llama.cpp cannot be called from here."""
    _library()


class LlamaModel:
    """A GGUF file in the memory of this process, not mapped, so that its pages are like everybody's.

    Raises BadInputError where llama.cpp cannot open it.
    """

    def __init__(self, path: Path):
        self._library = library = _library()
        self.path = Path(path)
        settings = library.settings(BATCH, 1, 1)
        made = library.from_common(_MODEL_SETTINGS, settings)
        self.handle = library.call("llama_model_load_from_file", str(path).encode(), made)
        if not self.handle:
            raise BadInputError(f"{path}: llama.cpp cannot open it: {library.why()}")
        weakref.finalize(self, library.call, "llama_model_free", self.handle)
        self.vocabulary = library.call("llama_model_get_vocab", self.handle)
        self.vocab_size = int(library.call("llama_vocab_n_tokens", self.vocabulary))
        self.positions = int(library.call("llama_model_n_ctx_train", self.handle))

    def metadata(self, key: str) -> str | None:
        """What the file says under `key`, where that is there and no array."""
        room = ctypes.create_string_buffer(1024)
        length = self._library.call("llama_model_meta_val_str", self.handle, key.encode(), room, len(room))
        return None if length < 0 else room.value.decode(errors="replace")

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Ids of `text`; with `special` those that the file has put around every text too. Names of special tokens in
        the text are these tokens."""
        data = text.encode()
        ids = np.empty(len(data) + 8, np.int32)
        count = self._library.call(
            "llama_tokenize", self.vocabulary, data, len(data), ids.ctypes.data, len(ids), special, True
        )
        assert count >= 0, "a token is a byte at least"
        found: list[int] = ids[:count].tolist()
        return found

    def context(self, tokens: int, sequences: int, threads: int, *, full: bool) -> LlamaContext:
        """With memory for `sequences` of `tokens` each; all in float32 where it is to be `full`, else the cache in
        float16 and flash attention, as llama.cpp does it by itself."""
        return LlamaContext(self, tokens, sequences, threads, full)


class LlamaContext:
    """A cache of keys and values, and what computes with it. Raises BadInputError where there is no memory for it."""

    def __init__(self, model: LlamaModel, tokens: int, sequences: int, threads: int, full: bool):
        self._library = library = _library()
        self.model, self.sequences = model, sequences
        self.capacity = -(-tokens // _CHUNK) * _CHUNK  # of each sequence
        self._batch = min(BATCH, self.capacity * sequences)
        settings = library.settings(self.capacity * sequences, sequences, threads, full=full)
        self.handle = library.call(
            "llama_init_from_model", model.handle, library.from_common(_CONTEXT_SETTINGS, settings)
        )
        if not self.handle:
            raise BadInputError(f"{model.path}: llama.cpp cannot run it: {library.why()}")
        weakref.finalize(self, library.call, "llama_free", self.handle)
        asked = {"n_ctx_seq": self.capacity, "n_batch": self._batch, "n_seq_max": sequences, "n_threads": threads}
        for name, wanted in asked.items():
            if (got := library.call(f"llama_{name}", self.handle)) != wanted:
                raise library.unknown(f"{name} is {got} where {wanted} was asked for")

    def clear(self) -> None:
        self._library.call("llama_memory_clear", self._library.call("llama_get_memory", self.handle), False)

    def decode(
        self, tokens: NDArray[np.int64], positions: NDArray[np.int64], rows: NDArray[np.int64], wanted: NDArray[Any]
    ) -> NDArray[np.float32]:
        """Feeds tokens [n] of the sequences `rows` at their positions; returns the logits of the `wanted` among them,
        float32 [wanted, vocab]. Raises BadInputError where llama.cpp does not compute them."""
        made = [
            self._decode(*(array[start : start + self._batch] for array in (tokens, positions, rows, wanted)))
            for start in range(0, len(tokens), self._batch)
        ]
        return made[0] if len(made) == 1 else np.concatenate(made)

    def _decode(self, tokens: Any, positions: Any, rows: Any, wanted: Any) -> NDArray[np.float32]:
        count = len(tokens)
        tokens, positions, rows = (np.ascontiguousarray(array, np.int32) for array in (tokens, positions, rows))
        flags, ones = np.ascontiguousarray(wanted, np.int8), np.ones(count, np.int32)
        places = (rows.ctypes.data + rows.itemsize * np.arange(count)).astype(np.uintp)  # each token's list of rows
        arrays = (tokens, None, positions, ones, places, flags)
        batch = _Batch(count, *(None if array is None else array.ctypes.data for array in arrays))
        if status := self._library.call("llama_decode", self.handle, batch):
            raise BadInputError(f"{self.model.path}: llama.cpp failed ({status}): {self._library.why()}")
        shape = (int(flags.sum()), self.model.vocab_size)
        if not shape[0]:
            return np.empty(shape, np.float32)
        return np.ctypeslib.as_array(self._library.call("llama_get_logits", self.handle), shape).copy()

    def state_bytes(self, row: int) -> int:
        return int(self._library.call("llama_state_seq_get_size", self.handle, row))

    def copy_to(self, other: LlamaContext, rows: int) -> None:
        """The first `rows` sequences."""
        for row in range(rows):
            state = np.empty(self.state_bytes(row), np.uint8)
            place, size = state.ctypes.data, state.nbytes
            self._library.call("llama_state_seq_get_data", self.handle, place, size, row)
            if not self._library.call("llama_state_seq_set_data", other.handle, place, size, row):
                raise BadInputError(f"{self.model.path}: llama.cpp cannot move its cache: {self._library.why()}")


class _Library:
    """The loaded module. Errors in llama.cpp's log are kept, and nothing of it is printed."""

    def __init__(self) -> None:
        try:
            import xllamacpp
        except ImportError as error:
            raise BadInputError(
                f"GGUF files run in llama.cpp, and the package xllamacpp is missing: {INSTALL}"
            ) from error
        self.package: Any = xllamacpp
        self._said: deque[str] = deque(maxlen=50)
        self._log = _Log(self._keep)
        self._lock = threading.Lock()
        library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
        for name, (gives, takes) in _FUNCTIONS.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise self.unknown(f"it does not show {name}") from None
            function.restype, function.argtypes = gives, takes
        self._functions = library
        self.call("llama_log_set", self._log, None)
        self.call("llama_backend_init")
        odd = self.settings(12_345, 3, 1)
        if ctypes.c_uint32.from_buffer(self.from_common(_CONTEXT_SETTINGS, odd)).value != odd.n_ctx:
            raise self.unknown("its settings are not where they were")

    def call(self, name: str, *arguments: Any) -> Any:
        return getattr(self._functions, name)(*arguments)

    def settings(self, tokens: int, sequences: int, threads: int, *, full: bool = False) -> Any:
        """xllamacpp's settings for a cache of so many tokens in all."""
        package = self.package
        try:
            made = package.CommonParams()
            made.n_ctx, made.n_parallel, made.kv_unified = tokens, sequences, False
            made.n_batch = made.n_ubatch = BATCH
            made.cpuparams.n_threads = made.cpuparams_batch.n_threads = threads
            made.n_gpu_layers = 0
            made.load_mode = package.llama_load_mode.LLAMA_LOAD_MODE_NONE
            kind = package.ggml_type.GGML_TYPE_F32 if full else package.ggml_type.GGML_TYPE_F16
            made.cache_type_k = made.cache_type_v = kind
            if full:  # flash attention on the CPU computes in float16, whatever the cache holds
                made.flash_attn_type = package.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        except AttributeError as error:
            raise self.unknown(str(error)) from error
        return made

    def from_common(self, name: str, settings: Any) -> _Settings:
        """llama.cpp's struct of these settings, which lie in the Python object, behind its head. A struct of a context
        begins with the number of tokens."""
        made: _Settings = self.call(name, id(settings) + object.__basicsize__)
        return made

    def unknown(self, what: str) -> BadInputError:
        version = getattr(self.package, "__version__", "?")
        return BadInputError(f"xllamacpp {version} is unlike {KNOWN}, which is known to work: {what}. {INSTALL}")

    def why(self) -> str:
        """What llama.cpp complained of first, in one line, since it was asked last."""
        with self._lock:
            said = next((line.strip() for line in self._said if line.strip()), "it does not say why")
            self._said.clear()
        return said

    def _keep(self, level: int, text: bytes | None, _: Any) -> None:
        if level == _ERROR and text:
            with self._lock:
                self._said.append(text.decode(errors="replace"))


_ERROR = 4  # of ggml_log_level


@functools.cache
def _library() -> _Library:
    return _Library()
