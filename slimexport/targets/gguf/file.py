"""Writing the file, and reading it back against what it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimexport.errors import NotReproducedError, reason
from slimexport.targets.gguf import precision as numbers
from slimexport.targets.gguf.architecture import Fields
from slimexport.targets.gguf.tensors import Tensors

_ARCHITECTURE = "general.architecture"


def write(path: Path, architecture: str, fields: Fields, tensors: Tensors, precision: str) -> None:
    """Everything in the order given: the same input gives the same bytes."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    try:
        for key, value in fields.items():
            _add(writer, key, value)
        for name, array in tensors.items():
            kind = numbers.type_of(name, array, precision)
            writer.add_tensor(name, numbers.stored(array, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
        return
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[type(value)](key, value)


def check(path: Path, architecture: str, fields: Fields, tensors: Tensors, precision: str) -> None:
    """Raises NotReproducedError unless the file holds these fields and tensors, no more and no less: floats as they are
    cast, every quantised number within the bound of its type (`precision.bound`)."""
    from gguf import GGUFReader

    try:
        found = GGUFReader(path)
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise NotReproducedError(f"{path} cannot be read back: {reason(error)}") from error
    said = {key: field.contents() for key, field in found.fields.items() if not key.startswith("GGUF.")}
    for key, wanted in {_ARCHITECTURE: architecture, **fields}.items():
        if not _same(said.pop(key, None), wanted):
            raise NotReproducedError(f"{path}: {key} is not what was written.")
    stored = {tensor.name: tensor for tensor in found.tensors}
    if said or set(stored) != set(tensors):
        odd = sorted({*said, *(set(stored) ^ set(tensors))})
        raise NotReproducedError(f"{path} does not hold exactly what was written: {', '.join(odd)}.")
    for name, array in tensors.items():
        if why := _differs(stored[name], name, array, precision):
            raise NotReproducedError(f"{path}: {name} {why}.")


def _same(said: Any, wanted: Any) -> bool:
    if isinstance(wanted, float):
        return isinstance(said, float) and np.float32(said) == np.float32(wanted)
    return bool(said == wanted)


def _differs(tensor: Any, name: str, array: NDArray[np.float32], precision: str) -> str | None:
    kind = numbers.type_of(name, array, precision)
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if tensor.tensor_type != kind or shape != array.shape:
        return f"is {tensor.tensor_type.name} {list(shape)}, not {kind.name} {list(array.shape)}"
    allowed = numbers.bound(array, kind)
    if allowed is None:
        wanted = numbers.stored(array, kind)
        same = np.array_equal(np.ascontiguousarray(tensor.data).view(np.uint8), wanted.view(np.uint8))
        return None if same else f"is not its source in {kind.name}"
    off = np.abs(numbers.read(tensor.data, kind, array.shape).astype(np.float64) - array).reshape(allowed.shape)
    wrong = ~(off <= allowed)  # NaN is wrong
    if not wrong.any():
        return None
    worst = int(np.argmax(np.where(np.isnan(off), np.inf, off - allowed)))
    found, most = off.flat[worst], allowed.flat[worst]
    return f"is off by {found:.3g} in block {worst // numbers.BLOCK}, where {kind.name} may be by {most:.3g}"


def meant(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """The numbers that the tensors of the file stand for, by name."""
    from gguf import GGUFReader

    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    return {name: numbers.read(found[name].data, found[name].tensor_type, shape) for name, shape in shapes.items()}
