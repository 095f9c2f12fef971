"""Criteria: what scores heads and channels and (maybe) compensates. One file each, found by the registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from slimexport.artifacts import BlockSizes
from slimexport.pruning.obs import Selection
from slimexport.registry import Registry


@dataclass(frozen=True)
class Site:
    """One output matrix of one block and what is to stay of it.

    W is [out, in] float64; H [in, in] float64, the undamped mean of the inputs' outer products; both on one device.
    """

    W: torch.Tensor
    H: torch.Tensor
    dense: BlockSizes
    keep: BlockSizes
    head_dim: int
    group_size_start: int
    group_size_end: int
    damping: float


class Criterion(Protocol):
    """Chooses and compensates. `Selection.kept` are query heads for `heads`, channels for `channels`."""

    def heads(self, site: Site) -> tuple[Selection, float]:
        """The selection and the damping that was used (0.0 where none is)."""
        ...

    def channels(self, site: Site) -> tuple[Selection, float]: ...


registry: Registry[Criterion] = Registry(
    "criterion", package="slimexport.pruning.criteria", group="slimexport.criteria"
)
