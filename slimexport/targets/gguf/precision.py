"""How numbers are stored: the types of llama.cpp that the precisions stand for, and how far each may be off.

Quantised types have blocks of 32 inputs of an output. Q8_0 is symmetric, one float16 scale a block. Q4_1 is asymmetric,
a float16 scale and minimum a block, like the int4 of the graphs. One-dimensional tensors stay in float32, and matrices
whose rows are no multiple of 32 in float16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slimexport.targets.gguf.tensors import EMBEDDING, HEAD

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

BLOCK = 32
_TYPES = {
    "fp32": ("F32", "F32"), "fp16": ("F16", "F16"), "bf16": ("BF16", "BF16"),
    "int8": ("Q8_0", "Q8_0"), "int4": ("Q4_1", "Q4_1"), "int4-mixed": ("Q4_1", "Q8_0"),
}  # fmt: skip
"""Precision -> types of the blocks' matrices, of the embedding and lm_head."""
_FILE_TYPES = {"F32": "ALL_F32", **{name: f"MOSTLY_{name}" for name in ("F16", "BF16", "Q8_0", "Q4_1")}}
_HALF = 2.0**-11  # relative error of a float16
_SMALLEST = 2.0**-25  # half of the smallest float16


def file_type(precision: str) -> int:
    """What `general.file_type` is for it."""
    from gguf import LlamaFileType

    return int(LlamaFileType[_FILE_TYPES[_TYPES[precision][0]]])


def type_of(name: str, array: NDArray[np.float32], precision: str) -> GGMLQuantizationType:
    """What the tensor is stored as."""
    from gguf import GGMLQuantizationType

    if array.ndim == 1:
        return GGMLQuantizationType.F32
    matrix, table = _TYPES[precision]
    wanted = table if name in (EMBEDDING, HEAD) else matrix
    if wanted.startswith("Q") and array.shape[-1] % BLOCK:
        wanted = "F16"
    return GGMLQuantizationType[wanted]


def stored(array: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[Any]:
    """The bytes in the file, or floats."""
    from gguf import quants

    made: NDArray[Any] = quants.quantize(array, kind)
    return made


def read(data: NDArray[Any], kind: GGMLQuantizationType, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The numbers that these bytes stand for."""
    from gguf import quants

    made: NDArray[np.float32] = quants.dequantize(data, kind).reshape(shape)
    return made


def bound(array: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[np.float64] | None:
    """How far each number may be from its source, [..., 32] for every block; None where it is that of the cast.

    Half a level, and what rounding the scale (and the minimum) to float16 adds.
    """
    if not kind.name.startswith("Q"):
        return None
    blocks = array.reshape(-1, BLOCK).astype(np.float64)
    if kind.name == "Q8_0":
        levels, offset = 127, 0.0
        step = np.abs(blocks).max(axis=1, keepdims=True) / levels
    else:
        levels = 15
        lowest = blocks.min(axis=1, keepdims=True)
        step = (blocks.max(axis=1, keepdims=True) - lowest) / levels
        offset = np.abs(lowest) * _HALF + _SMALLEST
    allowed: NDArray[np.float64] = 0.501 * step + levels * (step * _HALF + _SMALLEST) + offset
    return np.broadcast_to(allowed, blocks.shape)
