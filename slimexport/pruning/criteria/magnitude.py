"""Magnitude: the squared norm of a head's or channel's columns in the output matrix; no data, no compensation.

The plainest control there is that looks at the weights at all.
"""

from __future__ import annotations

from slimexport.pruning.criteria import Site, registry
from slimexport.pruning.legal import per_head, remove_channels, remove_heads
from slimexport.pruning.obs import Selection


class Magnitude:
    def heads(self, site: Site) -> tuple[Selection, float]:
        return remove_heads(site, per_head(site.W.square().sum(0), site.head_dim)), 0.0

    def channels(self, site: Site) -> tuple[Selection, float]:
        return remove_channels(site, site.W.square().sum(0)), 0.0


registry.register("magnitude")(Magnitude())
