"""Magnitude: the norm of a head's or channel's columns in the output matrix; no data, no compensation.

The plainest control there is. Heads follow the same legal moves as SlimGPT's, by running its greedy on H = I.
"""

from __future__ import annotations

import torch

from slimexport.pruning.criteria import Site, registry
from slimexport.pruning.obs import Selection, select_channels, select_heads


class Magnitude:
    def heads(self, site: Site) -> tuple[Selection, float]:
        # With H = I nothing is correlated: scores are squared norms and compensation is nil.
        return select_heads(
            site.W,
            torch.eye(site.W.shape[1], dtype=torch.float64, device=site.W.device),
            kv_groups=site.dense.kv_groups,
            heads_per_group=site.dense.heads_per_group,
            head_dim=site.head_dim,
            keep_groups=site.keep.kv_groups,
            keep_per_group=site.keep.heads_per_group,
        ), 0.0

    def channels(self, site: Site) -> tuple[Selection, float]:
        identity = torch.eye(site.W.shape[1], dtype=torch.float64, device=site.W.device)
        return select_channels(
            site.W, identity, keep=site.keep.channels, group_size_start=site.W.shape[1], group_size_end=1
        ), 0.0


registry.register("magnitude")(Magnitude())
