"""The blocks of a model that is on disk: read when their turn is, gone when it is over."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slimexport.errors import BadInputError
from slimexport.machine.heap import give_back, keep_apart
from slimexport.precisions import stays_in_float32
from slimexport.pruning.shrink import put, stored
from slimexport.streaming.files import TensorFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimexport.architectures.base import Architecture


LARGE = 2**22  # entries of a matrix


class StreamedBlocks:
    """A `pruning.blocks.BlockSource`. Blocks that are not loaded are on the meta device; while one is computed with,
    the next in the same direction is read."""

    streamed = True

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        files: TensorFiles,
        dtype: torch.dtype,
        name: str,
        *,
        pinned: bool = False,
    ):
        """`dtype`: what weights become as they are read, but for those that transformers keeps in float32; `name`: of
        the model, in errors; `pinned`: in page-locked memory, from which a CUDA device copies without waiting."""
        self._model, self._path, self._files = model, architecture.family.blocks, files
        self._blocks = model.get_submodule(self._path)
        self._dtype, self._name, self._pinned = dtype, name, pinned
        self._became: dict[int, TensorFiles] = {}
        self._loaded: set[int] = set()
        self._last: int | None = None
        self._ahead: tuple[int, Future[dict[str, torch.Tensor]]] | None = None
        if max(p.numel() for p in self._blocks.parameters()) >= LARGE:
            keep_apart()
        for index in range(len(self)):
            self._to_meta(index)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="blocks")

    def __len__(self) -> int:
        return len(self._blocks)

    def load(self, index: int) -> nn.Module:
        block: nn.Module = self._blocks[index]
        if index not in self._loaded:
            for name, tensor in self._fetched(index).items():
                put(block, name, tensor)
            self._loaded.add(index)
        following = index + (1 if self._last is None else index - self._last)
        self._last = index
        if following != index and 0 <= following < len(self._blocks) and following not in self._loaded:
            self._ahead = following, self._reader.submit(self._read, following)
        return block

    def release(self, index: int, became: Path | None = None) -> None:
        if index not in self._loaded:
            return
        if became is not None:
            self._became[index] = TensorFiles(became)
        self._to_meta(index)
        self._loaded.discard(index)
        give_back()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it the model can be called: each block comes as it is reached and goes after it."""
        handles = []
        for index, block in enumerate(self._blocks):

            def before(_module: nn.Module, _args: Any, index: int = index) -> None:
                self.load(index)

            def after(_module: nn.Module, _args: Any, _result: Any, index: int = index) -> None:
                self.release(index)

            handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _to_meta(self, index: int) -> None:
        block = self._blocks[index]
        for name in _tensors_of(block):
            tensor = stored(block, name).data
            put(block, name, tensor.to("meta", self._dtype_of(index, name, tensor.dtype)))

    def _dtype_of(self, index: int, name: str, dtype: torch.dtype) -> torch.dtype:
        if not dtype.is_floating_point:
            return dtype
        kept = stays_in_float32(self._model, f"{self._path}.{index}.{name}", self._dtype)
        return torch.float32 if kept else self._dtype

    def _fetched(self, index: int) -> dict[str, torch.Tensor]:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == index:
            return ahead[1].result()
        if ahead is not None:
            ahead[1].cancel()
        return self._read(index)

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        found = {}
        for name in _tensors_of(self._blocks[index]):
            whole = f"{self._path}.{index}.{name}"
            own = self._became.get(index)
            tensor = own.read(name) if own is not None and name in own else self._files.read(whole)
            found[name] = tensor.to(self._dtype_of(index, name, tensor.dtype))
            if found[name].dtype != tensor.dtype and not bool(torch.isfinite(found[name]).all()):
                raise BadInputError(f"Weights of {self._name} overflow in {self._dtype}: choose another --save-dtype.")
            if self._pinned:
                found[name] = found[name].pin_memory()
        return found


def _tensors_of(block: nn.Module) -> list[str]:
    """Names of what a checkpoint stores of `block`."""
    return list(block.state_dict(keep_vars=True))
