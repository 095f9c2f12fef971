"""Wanda-sp: Wanda's weight times input norm, summed over what goes together; no compensation.

Wanda (arXiv 2306.11695, section 3) scores single weights by |W_ij| ||X_j||_2; the structured form is the baseline of
the same name in FLAP (arXiv 2312.11983, experiments).
"""

from __future__ import annotations

import torch

from slimexport.pruning.criteria import Site, registry
from slimexport.pruning.legal import per_head, remove_channels, remove_heads
from slimexport.pruning.obs import Selection


def column_scores(site: Site) -> torch.Tensor:
    """sum_i |W_ij| ||X_j||_2 / sqrt(tokens) for every input j: [in].

    The norms are the square roots of H's diagonal; the constant and Wanda-sp's mean over rows change no order.
    """
    return site.W.abs().sum(0) * site.H.diagonal().clamp(min=0).sqrt()


class WandaSp:
    def heads(self, site: Site) -> tuple[Selection, float]:
        return remove_heads(site, per_head(column_scores(site), site.head_dim)), 0.0

    def channels(self, site: Site) -> tuple[Selection, float]:
        return remove_channels(site, column_scores(site)), 0.0


registry.register("wanda_sp")(WandaSp())
