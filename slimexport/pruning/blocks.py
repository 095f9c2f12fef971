"""The three seams through which the engine sees a model.

Where a block comes from (`BlockSource`), where the finished one goes (`BlockSink`), and where the hidden states of the
calibration set live (`states.HiddenStates`). Here source and sink are in memory, the sink with a copy on disk so that a
killed run can go on; `streaming.blocks` has a source that reads from disk.
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from slimexport.architectures.base import Architecture
from slimexport.architectures.family import Kept
from slimexport.artifacts import (
    BlockSizes,
    BlockTrace,
    check_identity,
    from_dict,
    read_json,
    replace,
    sha256_file,
    to_dict,
    write_json,
)
from slimexport.errors import BadInputError
from slimexport.pruning.shrink import shrink_block, stored
from slimexport.ranks import Message, Ranks
from slimexport.streaming.files import TensorFiles, Wanted, write_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BlockSource(Protocol):
    """Blocks in order. `load(i)` is the block itself, in stored precision, to be shrunk in place; after `release(i)` it
    may be gone from memory until it is loaded again, from the file of `became` where it was changed."""

    streamed: bool  # whether a released block is gone

    def __len__(self) -> int: ...
    def load(self, index: int) -> nn.Module: ...
    def release(self, index: int, became: Path | None = None) -> None: ...
    def running(self) -> AbstractContextManager[None]:
        """Within it the model as a whole can be called."""
        ...


class BlockSink(Protocol):
    """Takes finished blocks; knows how many an earlier, killed run has finished."""

    def finished(self) -> int: ...
    def restore(self, index: int, block: nn.Module) -> BlockTrace: ...
    def save(self, index: int, block: nn.Module, trace: BlockTrace) -> None: ...
    def file(self, index: int) -> Path | None:
        """Where the tensors of a finished block are."""
        ...


class ModelBlocks:
    """Blocks of a model that is in memory."""

    streamed = False

    def __init__(self, model: PreTrainedModel, architecture: Architecture):
        self._blocks = model.get_submodule(architecture.family.blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def load(self, index: int) -> nn.Module:
        return self._blocks[index]

    def release(self, index: int, became: Path | None = None) -> None:
        pass

    def running(self) -> AbstractContextManager[None]:
        return nullcontext()


class DirectorySink:
    """Keeps every finished block as `NNN.safetensors` (tensors) and `NNN.json` (trace) until the run is complete.

    The JSON is written last and by rename: a block counts as finished only with both files whole. `identity` says what
    the blocks were made from; a directory made from anything else is refused, with the first difference.
    """

    def __init__(self, directory: Path, architecture: Architecture, identity: dict[str, Any], *, resume: bool):
        self._directory, self._architecture = directory, architecture
        if not resume:
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "identity.json"
        if path.is_file():
            check_identity(read_json(path), identity, directory.parent)
        else:
            write_json(path, identity)

    def _paths(self, index: int) -> tuple[Path, Path]:
        return self._directory / f"{index:03d}.safetensors", self._directory / f"{index:03d}.json"

    def finished(self) -> int:
        count = 0
        while all(path.is_file() for path in self._paths(count)):
            count += 1
        return count

    def restore(self, index: int, block: nn.Module) -> BlockTrace:
        tensors, meta = self._paths(index)
        data = read_json(meta)
        if sha256_file(tensors) != data.pop("sha256"):
            raise BadInputError(f"{tensors} does not match its hash; start over with --force.")
        trace = from_dict(BlockTrace, data, str(meta))
        kept = kept_of(trace, self._architecture.blocks[index], self._architecture.experts)
        files = TensorFiles(tensors)
        shrink_block(block, self._architecture.by_block[index], kept, {name: files.read(name) for name in files.places})
        return trace

    def save(self, index: int, block: nn.Module, trace: BlockTrace) -> None:
        tensors, meta = self._paths(index)
        state = {w.name: stored(block, w.name) for w in self._architecture.by_block[index].block_weights()}
        partial = tensors.with_suffix(".partial")
        write_files({partial: {name: Wanted(t.dtype, tuple(t.shape)) for name, t in state.items()}}, [state])
        replace(partial, tensors)
        write_json(meta, {**to_dict(trace), "sha256": sha256_file(tensors)})

    def file(self, index: int) -> Path | None:
        return self._paths(index)[0]

    def discard(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)


class NullSink:
    """Keeps nothing: for the Python API and for tests."""

    def finished(self) -> int:
        return 0

    def restore(self, index: int, block: nn.Module) -> BlockTrace:
        raise NotImplementedError

    def save(self, index: int, block: nn.Module, trace: BlockTrace) -> None:
        pass

    def file(self, index: int) -> Path | None:
        return None


class SharedSink:
    """The first rank's sink, whose finished blocks all ranks go on from."""

    def __init__(self, sink: BlockSink, ranks: Ranks, architecture: Architecture):
        """`sink` counts on the first rank alone."""
        self._sink, self._ranks, self._architecture = sink, ranks, architecture

    def finished(self) -> int:
        return int(self._ranks.told(lambda: Message({"finished": self._sink.finished()})).values["finished"])

    def restore(self, index: int, block: nn.Module) -> BlockTrace:
        own = self._architecture.by_block[index]

        def restored() -> Message:
            trace = self._sink.restore(index, block)
            return Message(to_dict(trace), {w.name: stored(block, w.name) for w in own.block_weights()})

        heard = self._ranks.told(restored)
        trace = from_dict(BlockTrace, dict(heard.values), f"block {index} of rank 0")
        if self._ranks.rank:
            kept = kept_of(trace, self._architecture.blocks[index], self._architecture.experts)
            shrink_block(block, own, kept, dict(heard.tensors))
        return trace

    def save(self, index: int, block: nn.Module, trace: BlockTrace) -> None:
        if self._ranks.rank == 0:
            self._sink.save(index, block, trace)

    def file(self, index: int) -> Path | None:
        return self._sink.file(index) if self._ranks.rank == 0 else None


def kept_of(trace: BlockTrace, dense: BlockSizes, experts: int = 1) -> Kept:
    return Kept(tuple(trace.kv_groups), tuple(trace.query_heads), tuple(trace.channels), dense, experts)
