"""FLAP (arXiv 2312.11983, "Methodology"): what fluctuates little is replaced by its mean, as a bias.

Of the paper's three parts, the fluctuation metric orders the columns here and the baseline bias compensates. The
third, the adaptive search for how much goes from where, is the allocation's work: a plan fixes the sizes of every
block, and the paper's standardisation, which makes blocks comparable, changes no order within a matrix.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from slimexport.pruning.criteria import Site, registry
from slimexport.pruning.legal import per_head, remove_channels, remove_heads
from slimexport.pruning.obs import Selection


def column_scores(site: Site) -> torch.Tensor:
    """Var(x_j) ||W_:j||_2^2 for every input j: [in], the error that is left where x_j becomes its mean."""
    # The products in H are float32's: of an input that never changes they may leave less than nothing.
    variance = (site.H.diagonal() - site.mean.square()).clamp(min=0)
    return variance * site.W.square().sum(0)


def _with_bias(site: Site, selection: Selection) -> Selection:
    """`bias` [out] is the mean output of the removed columns. It takes ||bias||^2 off `error`, which is that of W'."""
    return replace(selection, bias=(site.W - selection.W) @ site.mean)


class Flap:
    compensates_bias = True

    def heads(self, site: Site) -> tuple[Selection, float]:
        return _with_bias(site, remove_heads(site, per_head(column_scores(site), site.head_dim))), 0.0

    def channels(self, site: Site) -> tuple[Selection, float]:
        return _with_bias(site, remove_channels(site, column_scores(site))), 0.0


registry.register("flap")(Flap())
