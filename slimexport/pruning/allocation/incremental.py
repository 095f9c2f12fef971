"""Incremental Pruning Ratio: later blocks lose more, rising with the logarithm of depth (arXiv 2412.18110, 3.4)."""

import math

from slimexport.pruning.allocation import Request, registry

# Share of the mean ratio that block 0 loses when nothing else is asked for (benchmarks/quality.py, first-ratio table).
FIRST_SHARE = 0.25


@registry.register("incremental")
def incremental(request: Request) -> list[float]:
    """r_i = first + (last - first) * log(i + 1) / log(n), with `last` solved so that the mean is the ratio asked."""
    n = request.blocks
    first = FIRST_SHARE * request.ratio if request.first_ratio is None else request.first_ratio
    if n == 1:
        return [request.ratio]
    rise = [math.log(i + 1) / math.log(n) for i in range(n)]
    last = first + (request.ratio - first) * n / sum(rise)
    return [first + (last - first) * r for r in rise]
