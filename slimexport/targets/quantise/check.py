"""Is every level in the file the one that its weight should have?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slimexport.errors import NotReproducedError
from slimexport.targets.quantise.graph import QUANTISED, Source, Sources, array, stored
from slimexport.targets.quantise.levels import BLOCK, Levels, unpacked

ROUNDING = 1e-4  # of a level: in float32 a weight half way between two may go to either


def check_quantised(path: Path, sources: Sources) -> None:
    """Holds every quantised weight of the graph in `path`, as its file has it, against what it was made from.

    The level that stands for a weight must be the nearest one there is: within half a level, or the first or the last.
    One wrong scale, zero point or code is seen, where logits would not show it. Raises NotReproducedError.
    """
    import onnx_ir as ir

    graph = ir.load(str(path)).graph
    found = set()
    for node in graph:
        if node.op_type not in QUANTISED:
            continue
        parts = stored(node)
        name = str(parts[0].name)
        found.add(name)
        source = sources.get(name)
        if source is None:
            raise NotReproducedError(f"{path}: {name} was made from no weight of the model.")
        if worst := _beyond_nearest(source, Levels(*map(array, parts))):
            raise NotReproducedError(f"{path}: {name} is off by {worst:.3g} levels somewhere, half a one is the most.")
    if missing := set(sources) - found:
        raise NotReproducedError(f"{path}: {min(missing)} is not in the graph.")


def _beyond_nearest(source: Source, levels: Levels) -> float:
    """By how many levels a weight of `source` is farther from its level than it need be; 0 where none is."""
    outputs, inputs = source.weight.shape
    blocks, last = -(-inputs // BLOCK), 2**levels.bits - 1
    codes = unpacked(levels.codes.reshape(outputs, -1), levels.bits)[:, :inputs].astype(np.float64)
    scale = np.repeat(levels.scales.reshape(outputs, blocks).astype(np.float64), BLOCK, axis=1)[:, :inputs]
    zero_points = unpacked(levels.zero_points.reshape(outputs, -1), levels.bits)[:, :blocks]
    zero = np.repeat(zero_points, BLOCK, axis=1)[:, :inputs]
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.where(scale == 0, np.where(source.weight == 0, zero, np.inf), source.weight / scale + zero)
    distance = np.abs(np.clip(wanted, 0, last) - codes)
    beyond = np.nan_to_num(wanted, nan=np.inf) - np.clip(wanted, 0, last)  # a range that is too small
    worst = float(distance.max() if source.cut else max(distance.max(), np.abs(beyond).max()))
    # A scale of 16 bits is itself rounded, by which the last level of all is off most.
    rounding = ROUNDING + float(np.finfo(levels.scales.dtype).eps) / 2
    return worst if not worst <= 0.5 + rounding * (last + 1) else 0.0
