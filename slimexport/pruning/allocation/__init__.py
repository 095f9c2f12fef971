"""Allocations: how the ratio is spread over the blocks, and between heads and channels. One file each, found by the
registry.

An allocation is a function from `Request` to either one wanted ratio per block, which the planner clips, hands on and
rounds to legal sizes, or to the sizes themselves. One with `needs_costs = True` gets measured costs (`request.costs`),
one with `searches = True` also a way to try whole plans (`request.search`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from slimexport.registry import Registry

if TYPE_CHECKING:
    from slimexport.architectures.base import Architecture
    from slimexport.artifacts import BlockSizes, CostTable
    from slimexport.pruning.grid import Grid

TOLERANCE = 0.005  # of the ratio asked, in absolute terms: what a plan may miss by rounding
FIRST_SHARE = 0.25  # of the mean ratio: what block 0 loses under the rising allocations, when nothing else is asked for


@dataclass(frozen=True)
class SearchSettings:
    """How an allocation tries whole plans, and how long it may."""

    evaluate: Callable[
        [Sequence[tuple[BlockSizes, ...]]], list[float]
    ]  # plans -> KL to the dense model, nats per token
    grids: Sequence[Grid]  # per block: the sizes that `evaluate` knows
    seed: int
    seconds: float
    evaluations: int
    state: Path | None = None  # a JSON file from which an interrupted search goes on
    identity: Mapping[str, Any] = field(default_factory=dict)  # what the state is good for
    progress: Callable[[int, int, str], None] = lambda done, total, text: None
    end: Callable[[], None] = lambda: None  # to be called when no more plans will be tried


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
    search: SearchSettings | None = None
    note: Callable[[str], None] = lambda text: None  # a line for the plan's notes

    @property
    def blocks(self) -> int:
        return len(self.architecture.blocks)

    @property
    def wanted_parameters(self) -> int:
        """Linear parameters of all blocks that are to stay."""
        return round((1 - self.ratio) * self.architecture.linear_parameters(self.architecture.blocks))

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
