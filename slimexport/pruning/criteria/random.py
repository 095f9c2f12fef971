"""Random: every legal set is as likely as any other; no compensation. What a criterion must beat to mean anything.

The draw depends on the seed, the block and whether heads or channels are asked for, and on nothing else.
"""

from __future__ import annotations

import hashlib

import torch

from slimexport.pruning.criteria import Site, registry
from slimexport.pruning.legal import remove_channels, remove_heads
from slimexport.pruning.obs import Selection


def _scores(site: Site, kind: str, count: int) -> torch.Tensor:
    """[count] uniform draws, whose order is a random permutation.

    Draws and not ranks: sums of ranks are often equal, and the lower KV group would go each time they are.
    """
    digest = hashlib.sha256(f"{site.seed}/{site.block}/{kind}".encode()).digest()
    # Drawn on the CPU: the same set on every device.
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(count, generator=generator, dtype=torch.float64)


class Random:
    def heads(self, site: Site) -> tuple[Selection, float]:
        return remove_heads(site, _scores(site, "heads", site.dense.query_heads)), 0.0

    def channels(self, site: Site) -> tuple[Selection, float]:
        return remove_channels(site, _scores(site, "channels", site.dense.channels)), 0.0


registry.register("random")(Random())
