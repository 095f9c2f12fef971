"""Where what comes by batches of the calibration set lives from one pass to the next: hidden states, inputs of heads,
the dense stream, what is kept for a pass backwards.

On the compute device, in host memory (page-locked, for a CUDA device), or in a file. Values are the same bits in each.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch

from slimexport.streaming.files import view_of

Place = Literal["device", "host", "file"]
CPU = torch.device("cpu")


class HiddenStates(Protocol):
    """One tensor per calibration batch, [sequences, length, width]; each comes on the compute device, and what is done
    to it there counts only once it is set."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[torch.Tensor]: ...
    def __getitem__(self, batch: int) -> torch.Tensor: ...
    def __setitem__(self, batch: int, states: torch.Tensor) -> None: ...
    def append(self, states: torch.Tensor) -> None: ...


class MemoryStates(list[torch.Tensor]):
    """In a list, on the compute device."""


class _Elsewhere:
    """What is common to those that hold copies: `_put` and `_get` by number."""

    def __init__(self, tensors: Iterable[torch.Tensor]):
        self._count = 0
        for tensor in tensors:
            self.append(tensor)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self._get(batch) for batch in range(self._count))

    def __getitem__(self, batch: int) -> torch.Tensor:
        return self._get(self._checked(batch))

    def __setitem__(self, batch: int, states: torch.Tensor) -> None:
        self._put(self._checked(batch), states)

    def append(self, states: torch.Tensor) -> None:
        self._put(self._count, states)
        self._count += 1

    def _checked(self, batch: int) -> int:
        if not -self._count <= batch < self._count:
            raise IndexError(batch)
        return batch % self._count

    def _put(self, batch: int, states: torch.Tensor) -> None:
        raise NotImplementedError

    def _get(self, batch: int) -> torch.Tensor:
        raise NotImplementedError


class HostStates(_Elsewhere):
    """In memory of the host, which a CUDA device reads directly while it computes."""

    def __init__(self, device: torch.device, tensors: Iterable[torch.Tensor] = ()):
        self._device, self._held = device, dict[int, torch.Tensor]()
        super().__init__(tensors)

    def _put(self, batch: int, states: torch.Tensor) -> None:
        old = self._held.get(batch)
        if old is None or old.shape != states.shape or old.dtype != states.dtype:
            # Locking pages takes longer than the copy: memory of the same size is used again.
            old = torch.empty(states.shape, dtype=states.dtype, pin_memory=self._device.type == "cuda")
            self._held[batch] = old
        old.copy_(states.detach())

    def _get(self, batch: int) -> torch.Tensor:
        held = self._held[batch]
        return held.clone() if self._device.type == "cpu" else held.to(self._device, non_blocking=True)


class _Slot(NamedTuple):
    start: int  # in bytes
    room: int
    shape: torch.Size
    dtype: torch.dtype


class FileStates(_Elsewhere):
    """In a file without a name, which is gone with the process however that ends.

    It is read and written, not mapped: mapped pages would count as this process's memory until the system takes them
    back.
    """

    def __init__(self, directory: Path | None, device: torch.device, tensors: Iterable[torch.Tensor] = ()):
        """`directory`: where the file is; None: where the system has its temporary ones."""
        self._device = device
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - as long as this lives
        self._slots: dict[int, _Slot] = {}
        self._end = 0
        super().__init__(tensors)

    def _put(self, batch: int, states: torch.Tensor) -> None:
        there = states.detach().to("cpu").contiguous()
        view = view_of(there)
        old = self._slots.get(batch)
        if old is not None and old.room >= len(view):
            slot = old._replace(shape=there.shape, dtype=there.dtype)
        else:
            slot = _Slot(self._end, len(view), there.shape, there.dtype)
            self._end += len(view)
        done = 0
        while done < len(view):
            done += os.pwrite(self._file.fileno(), view[done:], slot.start + done)
        self._slots[batch] = slot

    def _get(self, batch: int) -> torch.Tensor:
        slot = self._slots[batch]
        found = torch.empty(slot.shape, dtype=slot.dtype)
        view = view_of(found)
        done = 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], slot.start + done)
            if not count:
                raise OSError("a file of hidden states ended too early")
            done += count
        return found.to(self._device)


@dataclass(frozen=True)
class Keeper:
    """Makes `HiddenStates` that are to live in `place`."""

    place: Place = "device"
    device: torch.device = CPU
    directory: Path | None = None  # for files; None: where the system has its temporary ones

    def __call__(self, tensors: Iterable[torch.Tensor] = ()) -> HiddenStates:
        """That hold these tensors, of `device`, to begin with."""
        if self.place == "file":
            return FileStates(self.directory, self.device, tensors)
        return HostStates(self.device, tensors) if self.place == "host" else MemoryStates(tensors)

    def of_the_host(self) -> Keeper:
        """For what the CPU computes with: in its memory, or in a file."""
        return Keeper("file" if self.place == "file" else "device", CPU, self.directory)


ON_THE_DEVICE = Keeper()


@dataclass(frozen=True)
class Room:
    """What the passes through the blocks have to do with."""

    keep: Keeper = ON_THE_DEVICE
    batch_tokens: int | None = None  # in a forward call; None: as many as keep the device busy
