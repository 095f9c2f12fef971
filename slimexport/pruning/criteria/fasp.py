"""FASP (arXiv 2501.09412): Wanda's score summed over each column, then the kept columns are fitted anew, once.

Beside SlimGPT it shows what choosing with compensation in mind is worth: both end with a least-squares fit, but here
the choice knows nothing of it. The paper takes single columns out of heads; here a head goes whole or stays whole.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from slimexport.pruning.criteria import Site, registry
from slimexport.pruning.criteria.wanda_sp import column_scores
from slimexport.pruning.inverse import damped_inverse
from slimexport.pruning.legal import head_columns, per_head, remove_channels, remove_heads
from slimexport.pruning.obs import Selection, squared_error


def restore(site: Site, selection: Selection, columns: list[int]) -> tuple[Selection, float]:
    """W' = (W H)_:S (H_SS + delta I)^-1 on the kept columns S, delta = damping * mean(diag H_SS); the damping used.

    That is argmin ||(W' - W) X||^2 / tokens + delta ||W'||^2, the paper's restoration: delta pulls W' to zero, not to
    W, and so shrinks what is kept a little. `error` is without damping.
    """
    S = torch.tensor(columns, device=site.W.device)
    found = damped_inverse(site.H[S][:, S], site.damping)
    W = torch.zeros_like(site.W)
    W[:, S] = site.W @ site.H[:, S] @ found.inverse.double()
    return replace(selection, W=W, error=squared_error(W - site.W, site.H)), found.damping


class Fasp:
    def heads(self, site: Site) -> tuple[Selection, float]:
        selection = remove_heads(site, per_head(column_scores(site), site.head_dim))
        return restore(site, selection, head_columns(selection.kept, site.head_dim))

    def channels(self, site: Site) -> tuple[Selection, float]:
        selection = remove_channels(site, column_scores(site))
        return restore(site, selection, list(selection.kept))


registry.register("fasp")(Fasp())
