"""SlimGPT (arXiv 2412.18110): exact greedy over heads, Dynamic Group Size over channels, compensation by OBS.

Where the curvature of the model's output is known, errors are weighted by it; the paper counts all alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from slimexport.pruning.criteria import Site, registry
from slimexport.pruning.curvature import unweighted, weighted
from slimexport.pruning.inverse import DampedInverse, solved
from slimexport.pruning.obs import Selection, select_channels, select_heads


class SlimGPT:
    weighs_errors = True

    def heads(self, site: Site) -> tuple[Selection, float]:
        return _solved(
            site,
            select_heads,
            kv_groups=site.dense.kv_groups,
            heads_per_group=site.dense.heads_per_group,
            head_dim=site.head_dim,
            keep_groups=site.keep.kv_groups,
            keep_per_group=site.keep.heads_per_group,
        )

    def channels(self, site: Site) -> tuple[Selection, float]:
        return _solved(
            site,
            select_channels,
            keep=site.keep.channels,
            group_size_start=site.group_size_start,
            group_size_end=site.group_size_end,
        )


def _solved(site: Site, select: Callable[..., Selection], **sizes: int) -> tuple[Selection, float]:
    """In the weights' own terms: the least error of R W, given which columns are zero, comes with the least of W."""
    selection, found = solved(
        site.H, site.damping, lambda found: select(_weighted(site, found), found.inverse, **sizes)
    )
    precision = str(found.inverse.dtype).removeprefix("torch.")
    W = unweighted(selection.W, site.weighting)
    weighted = site.weighting is not None
    return replace(selection, W=W, ridge=found.ridge, factorised=precision, weighted=weighted), found.damping


def _weighted(site: Site, found: DampedInverse) -> torch.Tensor:
    W = site.W.masked_fill(found.dead, 0.0) if bool(found.dead.any()) else site.W
    return weighted(W, site.weighting)


registry.register("slimgpt")(SlimGPT())
