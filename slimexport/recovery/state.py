"""What an interrupted recovery goes on from: weights, the optimiser's moments, and numbers, written as one.

Tensors are in files of their own, numbered by save, which `state.json` names; that is written last, and only then are
older ones removed. So a process that is killed at any moment leaves one complete state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from slimexport.artifacts import check_identity, read_json, sync, write_json

STATE = "state.json"
Tensors = dict[str, torch.Tensor]


class TrainingState:
    """In directory `place`, of a recovery that is made from exactly `identity`."""

    def __init__(self, place: Path, identity: Mapping[str, Any]):
        self._place, self._identity = place, dict(identity)
        place.mkdir(parents=True, exist_ok=True)

    def numbers(self) -> dict[str, Any] | None:
        """Those that were saved last, None where nothing was. Raises BadInputError where they are of another run."""
        if not (self._place / STATE).is_file():
            return None
        found: dict[str, Any] = read_json(self._place / STATE)
        check_identity(found["identity"], self._identity, self._place)
        numbers: dict[str, Any] = found["numbers"]
        return numbers

    def tensors(self, what: str) -> Tensors:
        """Those that were saved last as `what`, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self._place / read_json(self._place / STATE)["files"][what])

    def save(self, numbers: Mapping[str, Any], tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """`tensors` by what they are; what is not among them stays as it was saved last."""
        from safetensors.torch import save_file

        path = self._place / STATE
        before: dict[str, Any] = read_json(path) if path.is_file() else {"files": {}, "save": 0}
        files, count = dict(before["files"]), before["save"] + 1
        for what, of in tensors.items():
            files[what] = f"{what}-{count}.safetensors"
            save_file({name: tensor.detach().contiguous() for name, tensor in of.items()}, self._place / files[what])
            sync(self._place / files[what])
        write_json(path, {"identity": self._identity, "save": count, "files": files, "numbers": numbers})
        for old in self._place.glob("*.safetensors"):
            if old.name not in files.values():
                old.unlink()
