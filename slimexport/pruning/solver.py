"""The cheapest legal plan: a multiple-choice knapsack over (block, part) with one option taken from each.

Exact by dynamic programming over parameters counted in their greatest common divisor (head and channel steps are a few
thousand of those for a model of 100 M parameters, a few ten thousand for one of 70 B; beyond `MOST_UNITS` the unit is
made coarser, and the plan is then exact for the rounded sizes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from slimexport.errors import BadInputError

T = TypeVar("T")

MOST_UNITS = 1 << 15


@dataclass(frozen=True)
class Option(Generic[T]):
    """One size of one part of the model: what stays in parameters, what that costs, and what it is."""

    parameters: int
    cost: float
    choice: T


def cheapest(parts: Sequence[Sequence[Option[T]]], parameters: int) -> list[Option[T]]:
    """One option of each part, so that their parameters come as near to `parameters` as any choice can and, of all
    choices that near, the sum of costs is the least.

    Raises BadInputError where a part has no option or a cost is not finite.
    """
    for i, options in enumerate(parts):
        if not options:
            raise BadInputError(f"Part {i} of the plan has no legal size.")
        if not all(math.isfinite(o.cost) for o in options):
            raise BadInputError(f"A cost of part {i} of the plan is not a finite number.")
    least = [min(o.parameters for o in options) for options in parts]
    unit = math.gcd(*(o.parameters - low for options, low in zip(parts, least, strict=True) for o in options)) or 1
    most = sum(max(o.parameters for o in options) - low for options, low in zip(parts, least, strict=True))
    unit = max(unit, math.ceil(most / MOST_UNITS))
    # Sizes above the smallest, in units; the coarse unit rounds each of them.
    units = [[round((o.parameters - low) / unit) for o in options] for options, low in zip(parts, least, strict=True)]
    room = sum(max(sizes) for sizes in units)
    best = np.full(room + 1, np.inf)
    best[0] = 0.0
    taken: list[np.ndarray] = []
    for options, sizes in zip(parts, units, strict=True):
        now = np.full(room + 1, np.inf)
        choice = np.full(room + 1, -1, dtype=np.int32)
        for index, (option, size) in enumerate(zip(options, sizes, strict=True)):
            reached = best[: room + 1 - size] + option.cost
            better = reached < now[size:]
            now[size:][better] = reached[better]
            choice[size:][better] = index
        best = now
        taken.append(choice)
    wanted = (parameters - sum(least)) / unit
    reachable = np.flatnonzero(np.isfinite(best))
    off = np.abs(reachable - wanted)
    nearest = reachable[off <= off.min() + 1e-9]
    at = int(nearest[np.argmin(best[nearest])])
    picked: list[Option[T]] = []
    for options, sizes, choice in zip(reversed(parts), reversed(units), reversed(taken), strict=True):
        index = int(choice[at])
        picked.append(options[index])
        at -= sizes[index]
    return picked[::-1]
