"""Sizes given by the user: a YAML or JSON table, or the plan.json of an earlier run.

    0: {kv_groups: 3, heads_per_group: 2, channels: 1024}
    1-29: {kv_groups: 3, heads_per_group: 3, channels: 896}

A range stands for every block in it; `"*"` (YAML wants the quotes) for every block that is not named.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from slimexport.artifacts import BlockSizes
from slimexport.errors import BadInputError, nearest
from slimexport.pruning.allocation import Request, registry

FIELDS = ("kv_groups", "heads_per_group", "channels")


@registry.register("explicit")
def explicit(request: Request) -> tuple[BlockSizes, ...]:
    """The sizes in `request.table`. Raises BadInputError for a missing table, block or field, or an illegal size."""
    if request.table is None:
        raise BadInputError("allocation explicit needs a table of sizes: --sizes FILE (YAML, JSON, or a plan.json).")
    sizes = read_sizes(request.table, request.blocks)
    for i, (block, dense) in enumerate(zip(sizes, request.architecture.blocks, strict=True)):
        for name in FIELDS:
            value, most = getattr(block, name), getattr(dense, name)
            if not 1 <= value <= most:
                raise BadInputError(f"{request.table}: block {i}: {name} {value} is not between 1 and {most}.")
        own = request.architecture.by_block[i]
        if (block.kv_groups, block.heads_per_group) not in own.legal_heads(dense):
            what = f"a {own.family.model_type} model" if own.has_heads else "this block"
            raise BadInputError(
                f"{request.table}: block {i}: the heads of {what} are not pruned: leave kv_groups and heads_per_group "
                "as they are in the dense model."
            )
        if block.channels != dense.channels and not own.has_channels:
            raise BadInputError(
                f"{request.table}: block {i}: the channels of this block are not pruned: leave them at "
                f"{dense.channels}, as in the dense model."
            )
        if block.channels % request.round_to and block.channels != dense.channels:
            raise BadInputError(
                f"{request.table}: block {i}: channels {block.channels} is no multiple of {request.round_to} "
                "(--round-to 1 allows any count)."
            )
    return sizes


def read_sizes(path: Path, blocks: int) -> tuple[BlockSizes, ...]:
    """The table in `path`, for a model of `blocks` blocks; legal or not."""
    from slimexport.recipe import read_yaml

    data = read_yaml(path.expanduser(), "Table of sizes")
    if isinstance(data, dict) and isinstance(data.get("blocks"), list):  # a plan.json
        data = dict(enumerate(data["blocks"]))
    elif isinstance(data, list):
        data = dict(enumerate(data))
    if not isinstance(data, dict):
        raise BadInputError(f"{path}: expected a table of blocks, found a {type(data).__name__}.")
    found: dict[int, BlockSizes] = {}
    for key, entry in data.items():
        if key == "*":
            continue
        for i in _range(path, key, blocks):
            if i in found:
                raise BadInputError(f"{path}: block {i} is named twice.")
            found[i] = _sizes(path, key, entry)
    if "*" in data:
        rest = _sizes(path, "*", data["*"])
        found |= {i: rest for i in range(blocks) if i not in found}
    missing = [i for i in range(blocks) if i not in found]
    if missing:
        raise BadInputError(f"{path}: block {missing[0]} is missing (the model has blocks 0 to {blocks - 1}).")
    return tuple(found[i] for i in range(blocks))


def _range(path: Path, key: Any, blocks: int) -> range:
    match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", str(key).strip())
    if match is None:
        raise BadInputError(f"{path}: {key!r} is neither a block, nor a range such as 1-29, nor *.")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first or last >= blocks:
        raise BadInputError(f"{path}: blocks {key} are not among the model's blocks 0 to {blocks - 1}.")
    return range(first, last + 1)


def _sizes(path: Path, key: Any, entry: Any) -> BlockSizes:
    if not isinstance(entry, dict):
        raise BadInputError(f"{path}: block {key}: expected {', '.join(FIELDS)}, found {entry!r}.")
    for name in entry:
        if name not in FIELDS:
            raise BadInputError(f"{path}: block {key}: unknown field {name!r}.{nearest(str(name), FIELDS)}")
    for name in FIELDS:
        if name not in entry:
            raise BadInputError(f"{path}: block {key}: {name} is missing.")
        if isinstance(entry[name], bool) or not isinstance(entry[name], int):
            raise BadInputError(f"{path}: block {key}: {name} must be a whole number, not {entry[name]!r}.")
    return BlockSizes(**entry)
