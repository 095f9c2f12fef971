"""What an exported decoder takes and gives: names, cache sizes and types, read from the graph (and its manifest)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimexport.artifacts import ExportArtifact, read_json
from slimexport.errors import BadInputError

# ONNX Runtime's type string -> (TensorProto code, bytes per element), for the types a cache can have.
_FLOATS = {"tensor(float)": (1, 4), "tensor(float16)": (10, 2), "tensor(bfloat16)": (16, 2)}
_PRECISIONS = {1: "fp32", 10: "fp16", 16: "bf16"}
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
ALL_LOGITS = "all_logits"  # targets/passes/last_logits.py
_ROLES = ("input_ids", "attention_mask", "position_ids")
# past_key_values.0.key and present.0.value (mobius), past_key_values.layers.0.keys (transformers.exporters)
_CACHE_NAME = re.compile(r"\.(\d+)\.(?:\w+\.)*(?:(key|value)s?|(conv_state|recurrent_state))$")

_Slot = tuple[int, str]  # block, "key" | "value" | "conv_state" | "recurrent_state"


@dataclass(frozen=True)
class CacheInput:
    """One cache input, the output that continues it, and its sizes after the batch: (heads, None, head_dim) of keys
    and values, whose length grows; all fixed for the state of a convolution or of linear attention."""

    block: int
    past: str
    present: str
    shape: tuple[int | None, ...]
    element: int  # TensorProto code
    itemsize: int


@dataclass(frozen=True)
class Signature:
    """`inputs` maps input_ids, attention_mask, position_ids (those that exist) to their name and type in the graph."""

    inputs: Mapping[str, tuple[str, Any]]
    logits: str
    caches: tuple[CacheInput, ...]  # ordered by block, a key before its value
    fixed_batch: int | None  # None: any
    all_logits: str | None  # the input that asks for every logit; None: the graph always gives them all
    vocab_size: int | None  # None: symbolic

    @property
    def float_precision(self) -> str:
        """Of the cache."""
        return _PRECISIONS[self.caches[0].element]

    @property
    def kv_bytes_per_token(self) -> int:
        """What one more token adds."""
        grown = [cache for cache in self.caches if None in cache.shape]
        return sum(math.prod(size or 1 for size in cache.shape) * cache.itemsize for cache in grown)


def read_signature(session: Any, path: Path, artifact: ExportArtifact | None) -> Signature:
    """Reads the signature of an `onnxruntime.InferenceSession`.

    KV heads may differ per block, so sizes come from each cache input; where a graph leaves them symbolic, from the
    manifest, or from the genai_config.json of another tool's graph. Raises BadInputError if the graph in `path` is not
    a decoder with a KV cache that slimexport can call.
    """
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    if artifact and (missing := set(artifact.inputs) - set(inputs)):
        raise BadInputError(f"{path} lacks the input {min(missing)} that its manifest names.")
    past = {slot: name for name in inputs if (slot := _slot(name))}
    present = {slot: name for name in outputs if (slot := _slot(name))}
    logits = [name for name in outputs if name.endswith("logits")]
    if not past or past.keys() != present.keys() or len(logits) != 1:
        raise BadInputError(f"{path} is not a decoder with a KV cache: no logits, or past and present differ.")
    tokens: dict[str, tuple[str, Any]] = {}
    for name in sorted(inputs.keys() - set(past.values())):
        role = name.rsplit(".", 1)[-1]
        if role not in _ROLES or inputs[name].type not in _INTEGERS:
            raise BadInputError(f"{path} has an input that slimexport cannot feed: {name} {inputs[name].type}.")
        tokens[role] = (name, _INTEGERS[inputs[name].type])
    if "input_ids" not in tokens:
        raise BadInputError(f"{path} has no input_ids.")
    caches = tuple(_cache(slot, inputs[past[slot]], present[slot], path, artifact) for slot in sorted(past))
    batch, vocab = inputs[tokens["input_ids"][0]].shape[0], outputs[logits[0]].shape[-1]
    return Signature(
        inputs=tokens,
        logits=logits[0],
        caches=caches,
        all_logits=next((v.name for v in session.get_overridable_initializers() if v.name == ALL_LOGITS), None),
        fixed_batch=batch if isinstance(batch, int) else None,
        vocab_size=vocab if isinstance(vocab, int) else None,
    )


def _cache(slot: _Slot, value: Any, present: str, path: Path, artifact: ExportArtifact | None) -> CacheInput:
    if slot[1].endswith("state"):
        _, *sizes = value.shape
        if value.type not in _FLOATS or not all(isinstance(size, int) for size in sizes):
            raise BadInputError(f"{path}: state {value.name} is {value.type} {value.shape}: its sizes must be fixed.")
        return CacheInput(slot[0], value.name, present, tuple(sizes), *_FLOATS[value.type])
    if value.type not in _FLOATS or len(value.shape) != 4:
        raise BadInputError(f"{path}: cache input {value.name} is {value.type} {value.shape}, not [b, h, t, d].")
    _, heads, _, head_dim = value.shape
    known = (artifact.kv_heads, artifact.head_dim) if artifact else _genai_sizes(path)
    if known and slot[0] < len(known[0]):
        heads = heads if isinstance(heads, int) else known[0][slot[0]]
        head_dim = head_dim if isinstance(head_dim, int) else known[1]
    if not (isinstance(heads, int) and isinstance(head_dim, int)):
        raise BadInputError(f"{path}: cache input {value.name} has symbolic sizes {value.shape} and no manifest.")
    return CacheInput(slot[0], value.name, present, (heads, None, head_dim), *_FLOATS[value.type])


def _genai_sizes(path: Path) -> tuple[tuple[int, ...], int] | None:
    """KV heads of every block and head_dim, where the graph is one of onnxruntime-genai's own builder."""
    config = path.parent / "genai_config.json"
    if not config.is_file():
        return None
    try:
        decoder = read_json(config)["model"]["decoder"]
        return (decoder["num_key_value_heads"],) * decoder["num_hidden_layers"], decoder["head_size"]
    except (KeyError, TypeError) as error:
        raise BadInputError(f"{config} does not say how large the cache is: {error} is missing.") from error


def _slot(name: str) -> _Slot | None:
    match = _CACHE_NAME.search(name)
    return (int(match[1]), match[2] or match[3]) if match else None
