"""Does the conformance suite see a wrong family file? Breaks one weight at a time, and expects a check to fail.

    python benchmarks/mutations.py [--only llama,gpt2]

For every weight of a block: it is left out; it runs along another axis; a fused one has its parts in another order, or
laid out the other way. Tiny random models, minutes in all. Exits with 1 where a broken table passed all checks.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimexport.architectures import registry
from slimexport.architectures.base import Architecture
from slimexport.architectures.family import Family, Kept
from slimexport.architectures.weights import (
    CHANNELS,
    KEY_VALUE,
    KV_GROUPS,
    LATENT_KEY_VALUE,
    LATENT_QUERY,
    QUERY,
    QUERY_HEADS,
    RESIDUAL,
    Fused,
    Weight,
)
from slimexport.testing import CHECKS, kinds, tiny_config

OTHER = {
    QUERY: KEY_VALUE, KEY_VALUE: QUERY, CHANNELS: RESIDUAL, RESIDUAL: CHANNELS, QUERY_HEADS: KV_GROUPS,
    KV_GROUPS: QUERY_HEADS, LATENT_QUERY: LATENT_KEY_VALUE, LATENT_KEY_VALUE: LATENT_QUERY,
}  # fmt: skip
CHEAP = ("table", "shrunk equals masked")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="families, joined by commas")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    survivors, made = [], 0
    for model, (name, changes) in kinds().items():
        if options.only and name not in options.only.split(","):
            continue
        family = registry.get(name)
        config = tiny_config(name, **changes)
        for what, broken in mutants(family):
            if same(family, broken, config):
                continue
            made += 1
            with registry.including(name, broken):
                if passes(config):
                    survivors.append(f"{model}: {what}")
        print(f"{model}: done", flush=True)
    print(f"{made} broken tables, {len(survivors)} not noticed", *survivors, sep="\n")
    sys.exit(bool(survivors))


def mutants(family: Family) -> Iterator[tuple[str, Family]]:
    weights = family.block_weights
    for index, weight in enumerate(weights):
        rest = (*weights[:index], *weights[index + 1 :])
        yield f"without {weight.name}", replace(family, block_weights=rest)
        for what, broken in wrong(weight):
            yield what, replace(family, block_weights=(*weights[:index], broken, *weights[index + 1 :]))


def wrong(weight: Weight) -> Iterator[tuple[str, Weight]]:
    for dim, axis in enumerate(weight.axes):
        others: list[str | Fused] = []
        if isinstance(axis, Fused):
            orders = set(itertools.permutations(axis.parts)) - {axis.parts}
            others = [replace(axis, parts=order) for order in sorted(orders)]
            others.append(
                replace(axis, turns=None if axis.turns else CHANNELS if CHANNELS in axis.parts else KV_GROUPS)
            )
        elif axis in OTHER:
            others = [OTHER[axis]]
        for other in others:
            axes = (*weight.axes[:dim], other, *weight.axes[dim + 1 :])
            yield f"{weight.name} along {other} instead of {axis}", replace(weight, axes=axes)


def same(family: Family, broken: Family, config: Any) -> bool:
    """Whether both tables mean the same for this model: with as many KV groups as query heads, the axes of q and of k
    are one."""
    dense, other = (Architecture.from_config(f, config) for f in (family, broken))
    weights, others = list(dense.block_weights()), list(other.block_weights())
    if [w.name for w in weights] != [w.name for w in others]:
        return False
    sizes = dense.blocks[0]
    groups = tuple(range(1, sizes.kv_groups))
    heads = tuple(g * sizes.heads_per_group + sizes.heads_per_group - 1 for g in groups)
    kept = Kept(groups, heads, tuple(range(3, sizes.channels)), sizes)
    return all(
        dense.axis_size(a, sizes) == other.axis_size(b, sizes)
        and dense.axis_index(a, kept) == other.axis_index(b, kept)
        for one, two in zip(weights, others, strict=True)
        for a, b in zip(one.axes, two.axes, strict=True)
    )


def passes(config: Any) -> bool:
    with tempfile.TemporaryDirectory() as place:
        try:
            for name in CHEAP:
                CHECKS[name](config, Path(place))
        except Exception:
            return False
    return True


if __name__ == "__main__":
    main()
