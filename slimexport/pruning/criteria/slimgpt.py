"""SlimGPT (arXiv 2412.18110): exact greedy over heads, Dynamic Group Size over channels, compensation by OBS."""

from __future__ import annotations

from slimexport.pruning.criteria import Site, registry
from slimexport.pruning.obs import Selection, damped_inverse, select_channels, select_heads


class SlimGPT:
    def heads(self, site: Site) -> tuple[Selection, float]:
        inverse, dead, damping = damped_inverse(site.H, site.damping)
        selection = select_heads(
            site.W.masked_fill(dead, 0.0),
            inverse,
            kv_groups=site.dense.kv_groups,
            heads_per_group=site.dense.heads_per_group,
            head_dim=site.head_dim,
            keep_groups=site.keep.kv_groups,
            keep_per_group=site.keep.heads_per_group,
        )
        return selection, damping

    def channels(self, site: Site) -> tuple[Selection, float]:
        inverse, dead, damping = damped_inverse(site.H, site.damping)
        selection = select_channels(
            site.W.masked_fill(dead, 0.0),
            inverse,
            keep=site.keep.channels,
            group_size_start=site.group_size_start,
            group_size_end=site.group_size_end,
        )
        return selection, damping


registry.register("slimgpt")(SlimGPT())
