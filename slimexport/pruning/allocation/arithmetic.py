"""Monotonically rising arithmetic progression ("Determining Layer-wise Sparsity for Large Language Models Through a
Theoretical Perspective", arXiv 2502.14770): the ratio grows by the same step from each block to the next, since the
error of an early block is carried through all that follow."""

from slimexport.pruning.allocation import Request, registry


@registry.register("arithmetic")
def arithmetic(request: Request) -> list[float]:
    """r_i = ratio + step * (i - (n - 1) / 2), with the step that gives block 0 its first ratio (the paper's one free
    parameter, there called beta, is that step)."""
    n = request.blocks
    if n == 1:
        return [request.ratio]
    step = 2 * (request.ratio - request.first) / (n - 1)
    return [request.ratio + step * (i - (n - 1) / 2) for i in range(n)]
