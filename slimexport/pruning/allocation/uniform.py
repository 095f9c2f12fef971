"""The same ratio in every block."""

from slimexport.pruning.allocation import Request, registry


@registry.register("uniform")
def uniform(request: Request) -> list[float]:
    return [request.ratio] * request.blocks
