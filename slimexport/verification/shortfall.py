"""Why a speed-up falls short of its ideal: the part of the time that pruning leaves as it is."""

from __future__ import annotations

from slimexport.artifacts import Figure

ENOUGH = 0.95  # of the ideal; above, nothing needs a reason


def shortfall(figure: Figure, operators: int) -> str | None:
    """One sentence for a time that was measured beside the dense model's and is less than `ENOUGH` of its ideal; None
    for all others. `operators` are those of the graph, 0 where nobody counted them.

    If of the dense model's time a the part f does not shrink, and the rest does by the ideal ratio r, the shrunk one's
    is b = f + (a - f) r: so f = (b - r a) / (1 - r).
    """
    dense, own, ideal = figure.baseline, figure.shrunk, figure.ideal
    if not figure.valid or dense is None or own is None or not figure.ratio or not ideal or ideal >= 1:
        return None
    if figure.better != "lower" or ideal / figure.ratio >= ENOUGH:
        return None
    fixed = (figure.ratio * dense - ideal * dense) / (1 - ideal)
    decodes = figure.name.startswith("decode.")
    counted = "bytes" if decodes else "FLOPs"
    reached = f"{figure.name} has {ideal / figure.ratio:.0%} of its ideal speed-up"
    if not 0 < fixed < own:
        return (
            f"{reached}, and the shrunk model is no faster: its "
            f"{counted} are worked off more slowly (sizes that the kernels do not like?)."
        )
    what = "attention over the cache, norms" if decodes else "attention, norms"
    calls = f", the calls of {operators} operators" if operators else ""
    return (
        f"{reached}, as if about {fixed:.2g} of {own:.3g} "
        f"{figure.unit} did not shrink with the {counted} ({what}{calls}); lm_head is in the ideal."
    )
