"""Tensors of safetensors files, read and written one at a time.

Nothing is mapped into memory: a mapped page counts as this process's until the system takes it back, and what is read
through a mapping stays there as long as any tensor of it. The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from slimexport.errors import BadInputError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The library's order within a file: by type, the last of these first, then by name.
_ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Place:
    """Where a tensor is: `start` and `length` in bytes, from the beginning of the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    length: int


class TensorFiles:
    """The tensors of a directory (one file or shards with an index), or of a file. Headers alone are kept."""

    def __init__(self, path: Path):
        """Raises BadInputError for a file that is missing or whose header cannot be read."""
        self.places: dict[str, Place] = {}
        for file in files_of(path):
            self.places.update(_places(file))

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors have the same bytes, of which few are in memory."""
        a, b = self.places[one], self.places[other]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with open(a.path, "rb") as first, open(b.path, "rb") as second:
            first.seek(a.start)
            second.seek(b.start)
            for start in range(0, a.length, CHUNK_BYTES):
                size = min(CHUNK_BYTES, a.length - start)
                if first.read(size) != second.read(size):
                    return False
        return True

    def read(self, name: str) -> torch.Tensor:
        """A copy in memory of its own. Raises BadInputError where the file ends before the tensor does."""
        place = self.places[name]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        view = view_of(tensor)
        with open(place.path, "rb", buffering=0) as stream:
            stream.seek(place.start)
            if _read_into(stream, view) != place.length:
                raise BadInputError(f"{place.path} is truncated: it ends within tensor {name}.")
        return tensor


def files_of(path: Path) -> list[Path]:
    """The files that hold the tensors of `path`, a directory or a file."""
    return [path] if path.is_file() else [path / name for name in names_of(path)]


def names_of(directory: Path) -> list[str]:
    """Of the files with its tensors: one, or those of the index, which may be left from before there was the one (and
    transformers looks for that first). Raises BadInputError for an index that is none."""
    index = directory / INDEX
    if (directory / SINGLE).is_file() or not index.is_file():
        return [SINGLE]
    try:
        return [str(name) for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
        raise BadInputError(f"{index} is not a valid safetensors index ({type(error).__name__}: {error}).") from error


def view_of(tensor: torch.Tensor) -> memoryview:
    """Of a contiguous tensor, its own memory."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _read_into(stream: IO[bytes], view: memoryview) -> int:
    """Bytes that were there: one call reads 2 GB at most."""
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    return done


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, by name, and where in it their bytes begin. Raises BadInputError for
    a file that is missing, cut short or something else; safetensors' own message does not name it."""
    if not path.is_file():
        raise BadInputError(f"{path} is missing.")
    size = path.stat().st_size
    with open(path, "rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise BadInputError(
                f"{path} is truncated or no safetensors file: its header does not fit into {size} bytes."
            )
        try:
            header = {name: entry for name, entry in json.loads(stream.read(length)).items() if name != "__metadata__"}
            end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInputError(f"{path} is corrupt: its safetensors header cannot be read ({error}).") from error
    if end != size:
        raise BadInputError(f"{path} is truncated or corrupt: {size} bytes on disk, its header promises {end}.")
    return header, 8 + length


def _places(path: Path) -> dict[str, Place]:
    header, begin = header_of(path)
    try:
        return {
            name: Place(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), begin + start, end - start)
            for name, entry in header.items()
            for start, end in [entry["data_offsets"]]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"{path} is corrupt: its safetensors header cannot be read ({error}).") from error


@dataclass(frozen=True)
class Wanted:
    """A tensor that is to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def write_tensors(
    directory: Path,
    wanted: Mapping[str, Wanted],
    batches: Iterable[Mapping[str, torch.Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `wanted` as one file, or as shards with an index, as transformers does (one file: the same bytes).

    `batches` give all of them, some at a time: only these are in memory. The directory is one that nobody reads yet:
    files are complete when this returns, and on disk.
    """
    shards = _shards(wanted, shard_bytes)
    names = _file_names(len(shards))
    if len(shards) > 1:
        _write_index(directory, shards, names, sum(want.length for want in wanted.values()))
    write_files({directory / file: {name: wanted[name] for name in shard}
                 for file, shard in zip(names, shards, strict=True)}, batches)  # fmt: skip


def write_files(files: Mapping[Path, Mapping[str, Wanted]], batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """Writes each of `files` with its tensors, whatever the order `batches` give them in."""
    opened: dict[str, tuple[Wanted, IO[bytes], int]] = {}
    streams = []
    try:
        for path, shard in files.items():
            stream: IO[bytes] = open(path, "wb")  # noqa: SIM115 - several at once, closed below
            streams.append(stream)
            header, offsets = _header(shard)
            stream.write(header)
            opened |= {name: (shard[name], stream, len(header) + offset) for name, offset in offsets.items()}
        for batch in batches:
            for name, tensor in batch.items():
                want, into, start = opened.pop(name)
                if (tensor.dtype, tuple(tensor.shape)) != (want.dtype, want.shape):
                    raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {want.dtype} {want.shape}")
                into.seek(start)
                into.write(view_of(tensor.detach().cpu().contiguous()))
        if opened:
            raise ValueError(f"{len(opened)} tensors were not given, the first is {next(iter(opened))}")
        for stream in streams:
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        for stream in streams:
            stream.close()


def _shards(wanted: Mapping[str, Wanted], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, want in wanted.items():
        if shards[-1] and want.length > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= want.length
    return shards


def _file_names(count: int) -> list[str]:
    return [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _write_index(directory: Path, shards: list[list[str]], files: list[str], total: int) -> None:
    from slimexport.artifacts import write_json

    where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def _header(wanted: Mapping[str, Wanted]) -> tuple[bytes, dict[str, int]]:
    """The header of a file, with its length before it, and where each tensor begins after it."""
    order = sorted(wanted, key=lambda name: (-_ORDER.index(_NAMES[wanted[name].dtype]), name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, at = {}, 0
    for name in order:
        want = wanted[name]
        offsets[name] = at
        at += want.length
        entries[name] = {
            "dtype": _NAMES[want.dtype],
            "shape": list(want.shape),
            "data_offsets": [offsets[name], at],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets
