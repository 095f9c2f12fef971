"""Which sizes of a block's heads and channels are legal, which of them are measured, and which are searched over."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Size = TypeVar("Size")
Heads = tuple[int, int]  # KV groups, query heads per group

PROBED_SHARES = (0.84, 0.67, 0.34)  # of the attention's and of the FFN's parameters: the sizes whose KL is measured
POSITIONS = 4  # every fourth position is scored: neighbours say nearly the same, and the vocabulary is dear
PROBE_LENGTH = 256  # tokens of a calibration sequence that are compared: many short pieces say more than few long ones
COST_SEQUENCES = 32  # of the calibration set, for the H of the cost curves: their shape needs no more
SEARCHED_HEADS = 9  # structures per block, at most
SEARCHED_CHANNELS = 12  # channel counts per block, at most


@dataclass(frozen=True)
class Grid:
    """The sizes of one block that a search may choose from, its dense ones among them."""

    heads: tuple[Heads, ...]
    channels: tuple[int, ...]


def legal_channels(dense: int, round_to: int) -> list[int]:
    """Channel counts that a plan may choose, from the dense one down; never none."""
    below = range((dense - 1) // round_to * round_to, 0, -round_to)
    return [dense, *below]


def probed(shares: Mapping[Size, float], among: Collection[Size]) -> list[Size]:
    """The sizes whose shares are nearest to the probed ones, each once."""
    found: list[Size] = []
    for wanted in PROBED_SHARES:
        rest = [size for size in among if size not in found]
        if rest:
            found.append(min(rest, key=lambda size: abs(shares[size] - wanted)))
    return found


def searched_heads(errors: Mapping[Size, float], shares: Mapping[Size, float]) -> list[Size]:
    """All structures where they are few; else those that no other beats in both error and parameters, thinned evenly.
    The largest (dense) and the smallest always stay."""
    by_size = sorted(errors, key=lambda size: (shares[size], errors[size]))
    if len(by_size) <= SEARCHED_HEADS:
        return by_size
    front = by_size[:1]
    for size in by_size[1:-1]:
        if errors[size] < errors[front[-1]]:
            front.append(size)
    return evenly([*front, by_size[-1]], SEARCHED_HEADS)


def searched_channels(counts: Sequence[int]) -> list[int]:
    """Evenly spread over the legal counts, both ends included."""
    return evenly(counts, SEARCHED_CHANNELS)


def evenly(items: Sequence[Size], count: int) -> list[Size]:
    """`count` of `items` at even distances, first and last included; all where there are no more than that."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def centred(available: int, count: int) -> list[int]:
    """At most `count` indices below `available`: the middles of as many equal parts."""
    count = min(count, available)
    return [i * available // count + available // (2 * count) for i in range(count)]
