"""SlimGPT (arXiv 2412.18110): exact greedy over heads, Dynamic Group Size over channels, compensation by OBS.

Where the curvature of the model's output is known, errors are weighted by it; the paper counts all alike.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from slimexport.pruning.criteria import Site, registry
from slimexport.pruning.curvature import unweighted, weighted
from slimexport.pruning.obs import Selection, damped_inverse, select_channels, select_heads


class SlimGPT:
    weighs_errors = True

    def heads(self, site: Site) -> tuple[Selection, float]:
        inverse, dead, damping = damped_inverse(site.H, site.damping)
        selection = select_heads(
            _weighted(site, dead),
            inverse,
            kv_groups=site.dense.kv_groups,
            heads_per_group=site.dense.heads_per_group,
            head_dim=site.head_dim,
            keep_groups=site.keep.kv_groups,
            keep_per_group=site.keep.heads_per_group,
        )
        return _plain(site, selection), damping

    def channels(self, site: Site) -> tuple[Selection, float]:
        inverse, dead, damping = damped_inverse(site.H, site.damping)
        selection = select_channels(
            _weighted(site, dead),
            inverse,
            keep=site.keep.channels,
            group_size_start=site.group_size_start,
            group_size_end=site.group_size_end,
        )
        return _plain(site, selection), damping


def _weighted(site: Site, dead: torch.Tensor) -> torch.Tensor:
    return weighted(site.W.masked_fill(dead, 0.0), site.weighting)


def _plain(site: Site, selection: Selection) -> Selection:
    return replace(selection, W=unweighted(selection.W, site.weighting))


registry.register("slimgpt")(SlimGPT())
