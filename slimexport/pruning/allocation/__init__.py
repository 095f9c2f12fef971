"""Allocations: how the ratio is spread over the blocks, and between heads and channels. One file each, found by the
registry.

An allocation is a function from `Request` to either one wanted ratio per block, which the planner clips, hands on and
rounds to legal sizes, or to the sizes themselves. One with `needs_costs = True` gets measured costs (`request.costs`),
one with `searches = True` also a way to try a plan (`request.evaluate`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from slimexport.registry import Registry

if TYPE_CHECKING:
    from slimexport.architectures.base import Architecture
    from slimexport.artifacts import BlockSizes, CostTable

FIRST_SHARE = 0.25  # of the mean ratio: what block 0 loses under the rising allocations, when nothing else is asked for


@dataclass(frozen=True)
class Request:
    """`ratio` is the mean asked for; `first_ratio` the wish for block 0 (None: the allocation's own choice)."""

    architecture: Architecture
    ratio: float
    layout: str = "per_layer"
    round_to: int = 32
    first_ratio: float | None = None
    table: Path | None = None  # of the explicit allocation
    costs: CostTable | None = None
    evaluate: Callable[[Sequence[BlockSizes]], float] | None = None

    @property
    def blocks(self) -> int:
        return len(self.architecture.blocks)

    @property
    def first(self) -> float:
        return FIRST_SHARE * self.ratio if self.first_ratio is None else self.first_ratio


class Allocation(Protocol):
    def __call__(self, request: Request, /) -> Sequence[float] | tuple[BlockSizes, ...]: ...


registry: Registry[Allocation] = Registry(
    "allocation", package="slimexport.pruning.allocation", group="slimexport.allocations"
)


def needs_costs(allocation: Allocation) -> bool:
    """Whether `allocation` is planned from measured costs, and so needs the weights and the calibration text."""
    return bool(getattr(allocation, "needs_costs", False))


def searches(allocation: Allocation) -> bool:
    """Whether `allocation` tries whole plans on the model."""
    return bool(getattr(allocation, "searches", False))
