"""LLM-Pruner's Taylor criterion (arXiv 2305.11627, section 3.2): element-wise, first order; no compensation.

A coupled structure is worth the sum of |w dL/dw| over all weights that go with it. A query head takes its rows of q
and its columns of W; a KV group its rows of k and v as well; a channel its rows of gate and up and its column of W;
biases go with their rows.

`taylor_lora` takes for dL/dW what gradients by adapters of low rank say it is (LoRAPrune, arXiv 2305.18403): a model
that is too large for a gradient by every weight can be scored all the same.
"""

from __future__ import annotations

import torch

from slimexport.pruning.criteria import Site, registry
from slimexport.pruning.legal import per_head, remove_channels, remove_heads
from slimexport.pruning.obs import Selection


def _rows(site: Site, name: str) -> torch.Tensor:
    """sum over each row of |w g|: [rows], of a matrix [rows, hidden] or a bias [rows]."""
    weight = site.sources[name]
    return (weight * site.gradients[name]).abs().reshape(len(weight), -1).sum(1)


def _columns(site: Site) -> torch.Tensor:
    """sum over each column of W of |w g|: [in]."""
    return (site.W * site.gradients[site.name]).abs().sum(0)


def head_scores(site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of query heads [dense.query_heads], and of what only whole KV groups share [dense.kv_groups]."""
    heads = per_head(_columns(site), site.head_dim)
    groups = torch.zeros(site.dense.kv_groups, dtype=heads.dtype, device=heads.device)
    for name in site.sources:
        # Where there are as many KV groups as query heads, each group is one head and either way is the same.
        rows = _rows(site, name)
        if site.dense.kv_groups == len(heads) or len(rows) >= len(heads) * site.head_dim:
            heads = heads + rows.reshape(len(heads), -1).sum(1)  # a head may have more rows than its query: a gate
        elif len(rows) == len(groups) * site.head_dim:
            groups = groups + per_head(rows, site.head_dim)
        else:
            raise ValueError(f"{name} has {len(site.sources[name])} rows: neither query heads nor KV groups")
    return heads, groups


def channel_scores(site: Site) -> torch.Tensor:
    """Scores of channels [dense.channels]."""
    scores = _columns(site)
    for name in site.sources:
        scores = scores + _rows(site, name)
    return scores


RANK = 8  # LoRAPrune's


class Taylor:
    needs_gradients = True
    gradient_rank: int | None = None  # None: whole gradients

    def heads(self, site: Site) -> tuple[Selection, float]:
        return remove_heads(site, *head_scores(site)), 0.0

    def channels(self, site: Site) -> tuple[Selection, float]:
        return remove_channels(site, channel_scores(site)), 0.0


class TaylorLora(Taylor):
    gradient_rank = RANK


registry.register("taylor")(Taylor())
registry.register("taylor_lora")(TaylorLora())
