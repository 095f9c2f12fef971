"""Allocations: how the ratio is spread over the blocks. One file each, found by the registry.

An allocation is a free function from `Request` to one wanted ratio per block. The planner clips what is not possible,
hands the rest on, and rounds to legal sizes, so an allocation need not know about legality.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slimexport.registry import Registry


@dataclass(frozen=True)
class Request:
    """`ratio` is the mean asked for; `first_ratio` the wish for block 0 (None: the allocation's own choice)."""

    blocks: int
    ratio: float
    first_ratio: float | None = None


Allocation = Callable[[Request], list[float]]

registry: Registry[Allocation] = Registry(
    "allocation", package="slimexport.pruning.allocation", group="slimexport.allocations"
)
