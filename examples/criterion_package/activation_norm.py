"""Removes what speaks least: heads and channels whose activations are small on the calibration text. No compensation.

`site.H` is the mean of the outer products of W's inputs, so that its diagonal is the mean square of each of them.
"""

from __future__ import annotations

from slimexport.pruning.criteria import Site
from slimexport.pruning.legal import per_head, remove_channels, remove_heads
from slimexport.pruning.obs import Selection


class ActivationNorm:
    def heads(self, site: Site) -> tuple[Selection, float]:
        """The selection, and the damping that was used: none."""
        return remove_heads(site, per_head(site.H.diagonal(), site.head_dim)), 0.0

    def channels(self, site: Site) -> tuple[Selection, float]:
        return remove_channels(site, site.H.diagonal()), 0.0


criterion = ActivationNorm()
