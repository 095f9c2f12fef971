"""Legal choices by additive scores, and plain removal.

Where the worth of a set is the sum of its members' scores, the best legal set is found exactly, without a search:
every kept KV group keeps its best heads, whatever the other groups do, and the best groups are those whose kept heads
are worth most together. (SlimGPT's scores are not additive: they depend on what else is gone.) Of equal scores the
lower index goes first, as in `obs`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from slimexport.artifacts import BlockSizes
from slimexport.pruning.obs import Selection, squared_error

if TYPE_CHECKING:
    from slimexport.pruning.criteria import Site


def keep_heads(
    head_scores: torch.Tensor, dense: BlockSizes, keep: BlockSizes, group_scores: torch.Tensor | None = None
) -> tuple[int, ...]:
    """The query heads that stay, ascending: `keep.heads_per_group` of each of `keep.kv_groups` KV groups.

    Args:
        head_scores: [dense.query_heads], higher is worth more.
        group_scores: [dense.kv_groups], what a KV group is worth apart from its query heads (keys, values).

    Returns:
        The legal set with the largest sum of its heads' scores and its groups' scores.
    """
    by_group = head_scores.reshape(dense.kv_groups, dense.heads_per_group)
    ascending = by_group.sort(dim=1, stable=True).indices
    best = ascending[:, dense.heads_per_group - keep.heads_per_group :]
    worth = by_group.gather(1, best).sum(1)
    if group_scores is not None:
        worth = worth + group_scores
    groups = keep_channels(worth, keep.kv_groups)
    return tuple(sorted(g * dense.heads_per_group + h for g in groups for h in best[g].tolist()))


def keep_channels(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    """The `count` indices with the highest scores [n], ascending."""
    return tuple(sorted(scores.sort(stable=True).indices[len(scores) - count :].tolist()))


def head_columns(heads: Iterable[int], head_dim: int) -> list[int]:
    """Columns of the output matrix that read `heads`."""
    return [h * head_dim + d for h in heads for d in range(head_dim)]


def per_head(column_scores: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[heads * head_dim] -> [heads]: the sum over each head's columns."""
    return column_scores.reshape(-1, head_dim).sum(1)


def remove_heads(site: Site, head_scores: torch.Tensor, group_scores: torch.Tensor | None = None) -> Selection:
    """`keep_heads` and plain removal of the others' columns."""
    kept = keep_heads(head_scores, site.dense, site.keep, group_scores)
    return remove(site, kept, head_columns(kept, site.head_dim))


def remove_channels(site: Site, scores: torch.Tensor) -> Selection:
    """`keep_channels` and plain removal of the others."""
    kept = keep_channels(scores, site.keep.channels)
    return remove(site, kept, list(kept))


def remove(site: Site, kept: tuple[int, ...], columns: list[int]) -> Selection:
    """W with zeros outside `columns`, nothing compensated; the error is exact and undamped."""
    W = torch.zeros_like(site.W)
    W[:, columns] = site.W[:, columns]
    return Selection(kept, W, squared_error(W - site.W, site.H))
