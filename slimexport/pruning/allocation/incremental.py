"""Incremental Pruning Ratio: later blocks lose more, rising with the logarithm of depth (arXiv 2412.18110, 3.4)."""

import math

from slimexport.pruning.allocation import Request, registry


@registry.register("incremental")
def incremental(request: Request) -> list[float]:
    """r_i = first + (last - first) * log(i + 1) / log(n), with `last` solved so that the mean is the ratio asked."""
    n = request.blocks
    if n == 1:
        return [request.ratio]
    rise = [math.log(i + 1) / math.log(n) for i in range(n)]
    last = request.first + (request.ratio - request.first) * n / sum(rise)
    return [request.first + (last - request.first) * r for r in rise]
