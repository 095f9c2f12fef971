"""Several processes that prune one model together: each has a part of the calibration set, the first one decides.

torchrun (or accelerate launch) starts them and says who is who. What every one of them measures is added up; what is
chosen from it is chosen once and told to the others; files are the first one's. Nothing that is sent is unpickled:
JSON, and tensors of announced shapes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from slimexport.errors import BadInputError, SlimExportError

if TYPE_CHECKING:
    import torch

PATIENCE = timedelta(days=7)  # the others wait while the first one measures costs, or searches


@dataclass(frozen=True)
class Message:
    """What the first rank tells the others: values as JSON has them, and tensors by name."""

    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Ranks(Protocol):
    rank: int
    size: int

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Each becomes the sum of what all ranks have; to be called by all, in the same order."""
        ...

    def told(self, make: Callable[[], Message]) -> Message:
        """What `make` gives to the first rank, which alone calls it."""
        ...


class Alone:
    """One process."""

    rank, size = 0, 1

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        pass

    def told(self, make: Callable[[], Message]) -> Message:
        return make()


ALONE = Alone()


class Group:
    """The processes of `torch.distributed`'s default group."""

    def __init__(self, device: torch.device):
        """`device`: where tensors have to be to be sent."""
        from torch import distributed

        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._device = device

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        from torch import distributed

        for tensor in tensors:
            there = tensor.to(self._device)
            with _reached():
                distributed.all_reduce(there)
            if there is not tensor:
                tensor.copy_(there)

    def told(self, make: Callable[[], Message]) -> Message:
        if self.rank:
            return self._heard()
        try:
            message = make()
        except BaseException:
            self._say({"stopped": True})
            raise
        places = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in message.tensors.items()}
        self._say({"values": message.values, "tensors": places})
        for tensor in message.tensors.values():
            self._broadcast(tensor.detach().to(self._device).contiguous())
        return message

    def _heard(self) -> Message:
        import torch

        length = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._broadcast(length)
        text = torch.zeros(int(length), dtype=torch.uint8, device=self._device)
        self._broadcast(text)
        said = json.loads(text.cpu().numpy().tobytes())
        if said.get("stopped"):
            raise SlimExportError("Rank 0 stopped; its message says why.")
        tensors = {}
        for name, (dtype, shape) in said["tensors"].items():
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)
            self._broadcast(tensors[name])
        return Message(said["values"], tensors)

    def _say(self, what: dict[str, Any]) -> None:
        import torch

        text = torch.frombuffer(bytearray(json.dumps(what).encode()), dtype=torch.uint8).to(self._device)
        self._broadcast(torch.tensor([len(text)], device=self._device))
        self._broadcast(text)

    def _broadcast(self, tensor: torch.Tensor) -> None:
        from torch import distributed

        with _reached():
            distributed.broadcast(tensor, 0)


@contextmanager
def _reached() -> Iterator[None]:
    """Within it, ranks that are gone are the user's to look after."""
    import torch

    try:
        yield
    except (RuntimeError, torch.distributed.DistError) as error:
        raise SlimExportError(
            f"Another rank is gone ({str(error).splitlines()[0]}): its own message says why. --resume goes on."
        ) from error


def several() -> bool:
    """Whether torchrun, or what does as it does, started this process as one of many."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process is the one that decides and writes, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks that this process is one of, or itself alone. `device` as in RunConfig: of several CUDA devices each
    rank takes its own."""
    if not several():
        yield ALONE
        return
    import torch
    from torch import distributed

    from slimexport.loading import resolve_device

    place = resolve_device(device)
    if place.type == "cuda" and place.index is None:
        place = resolve_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(place)
    try:
        distributed.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise BadInputError(f"The ranks do not find each other: {str(error).splitlines()[0]}") from error
    try:
        yield Group(place)
    finally:
        distributed.destroy_process_group()


def beside() -> int:
    """How many ranks share this machine, this one counted."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if several() else 1


def summed(ranks: Ranks, value: float) -> float:
    """The sum of what all ranks have."""
    if ranks.size == 1:
        return value
    import torch

    total = torch.tensor([value], dtype=torch.float64)
    ranks.add_up([total])
    return float(total)


def shared(ranks: Ranks, directory: Path | None, place: Path) -> Path:
    """Where a rank has the files of the first one's `directory`: there itself, and otherwise copies in `place`."""

    def read() -> Message:
        import torch

        assert directory is not None
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        contents = {
            str(path.relative_to(directory)): torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            for path in files
            if path.stat().st_size
        }
        return Message(tensors=contents)

    if ranks.size == 1:
        assert directory is not None
        return directory
    said = ranks.told(read)
    if directory is not None:
        return directory
    for name, content in said.tensors.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.cpu().numpy().tobytes())
    return place


def versions(*names: str) -> dict[str, str]:
    """Of ourselves and of these packages, as facts for `check_alike`."""
    from slimexport.environment import environment

    found = environment()
    packages = {f"version of {name}": str(found["packages"].get(name)) for name in names}
    return {**packages, "version of slimexport": str(found["slimexport"])}


def check_alike(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Raises BadInputError, on every rank, where one has another version, model, text or option than the first."""
    first = ranks.told(lambda: Message(dict(facts))).values
    other = next((name for name, value in facts.items() if first.get(name) != value), None)
    unlike = summed(ranks, float(other is not None))
    if other is not None:
        raise BadInputError(f"Rank {ranks.rank} has {other} {facts[other]}, rank 0 has {first.get(other)}.")
    if unlike:
        raise BadInputError(f"{unlike:.0f} of {ranks.size} ranks have something else than rank 0: they say what.")
