"""SlimGPT's mathematics on plain tensors (arXiv 2412.18110, sections 3.2-3.4; Optimal Brain Surgeon underneath).

An output matrix W [out, in] reads inputs X [in, tokens]; H = X X^T / tokens, damped. Removing the input columns R and
re-fitting the others costs, with A = H^-1 restricted to what is still there,

    error(R) = tr(W_R (A_RR)^-1 W_R^T),          W <- W - W_R (A_RR)^-1 A_R:,      A <- A - A_:R (A_RR)^-1 A_R:

which is the exact least-squares optimum. This module imports torch and nothing else but `inverse`, which gives A.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from slimexport.pruning.inverse import SINGLE_FROM

ROWS = 256  # of H that are multiplied at a time
CACHED_ROWS = 16  # of a wide matrix: what is made of so many stays in a CPU's cache
TALL_FROM = 16  # columns: of so many a tall product takes two thirds of the time of a wide one on a CPU
ENUMERATION_LIMIT = 256  # combinations of one head per group that are still scored one by one
NOISE = {torch.float64: 1e-9, torch.float32: 1e-5}  # as a share of an error: what less is saved counts for nothing


# -------------------------------------------------------------------------------------------------------------- re-fit


def refit(W: torch.Tensor, H: torch.Tensor, missed: torch.Tensor, ridge: float) -> torch.Tensor:
    """The matrix that comes nearest to given targets, held toward W: argmin_V ||V X - Y||^2 / tokens + l ||V - W||^2.

    With all of its columns still there. Without a ridge ||V_S X_S - Y||^2 differs from ||V_S X_S - V X||^2 by a
    constant, so that removing columns from V by the equations above fits the kept ones to Y as well; with one, that
    holds exactly (and keeps the ridge) where it equals the damping of H, else V X, the compromise, is what they fit.

    Args:
        W: [out, in].
        H: [in, in], mean x x^T, undamped.
        missed: [out, in], mean (y - W x) x^T.
        ridge: l as a share of the mean diagonal of H. Inputs that never fired keep their columns.
    """
    W = W.double()
    system = H.double().clone()
    system.diagonal().add_(ridge * float(H.diagonal().mean()) or 1.0)
    factor = torch.linalg.cholesky(system)
    return W + torch.cholesky_solve(missed.double().T, factor).T


# --------------------------------------------------------------------------------------------------------- elimination


class Eliminator:
    """W and A = H^-1 while columns go, one group after another.

    A is never downdated: the columns of a pivoted block Cholesky factor L, computed when a group is chosen, give any
    entry of the current A as A_0 - L L^T. For n inputs of which k go that costs O(n k^2) instead of O(n^2 k), and
    loses no digits to repeated subtraction.

    Everything is in the precision of A_0, but for the current A's diagonal. Columns of W and of L, and those of A_0,
    which is symmetric, are rows in memory: a step reads and writes whole ones.
    """

    def __init__(self, W: torch.Tensor, inverse: torch.Tensor, removed: int = 64):
        """W [out, n] and inverse [n, n], float64 or float32, on one device; W is copied, `inverse` only read.
        `removed`: how many columns will go, as far as that is known: L is as large from the beginning."""
        self._columns = torch.empty(W.T.shape, dtype=inverse.dtype, device=W.device).copy_(W.T)
        self.alive = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
        self.error = 0.0  # sum of the exact errors of all groups removed so far
        self._inverse = inverse
        self._factor = torch.empty(min(removed, W.shape[1]), W.shape[1], dtype=inverse.dtype, device=W.device)  # L^T
        self._used = 0
        self.diagonal = inverse.diagonal().to(torch.float64, copy=True)  # of the current A

    @property
    def W(self) -> torch.Tensor:
        """[out, n] as it is now, in the precision of A_0: removed columns are zero."""
        return self._columns.T

    @property
    def _L(self) -> torch.Tensor:
        """L^T, [used, n]"""
        return self._factor[: self._used]

    def blocks(self, columns: torch.Tensor) -> torch.Tensor:
        """Current A restricted to each candidate: columns [c, s] -> [c, s, s]."""
        L = self._L[:, columns].transpose(0, 1)  # [c, used, s]
        return self._inverse[columns.unsqueeze(2), columns.unsqueeze(1)] - L.transpose(1, 2) @ L

    def scores(self, columns: torch.Tensor, chunk: int = 256, given: torch.Tensor | None = None) -> torch.Tensor:
        """Exact error of removing each candidate with optimal compensation: columns [c, s] -> [c] float64.

        One batched Cholesky over all candidates (the paper's grouped Cholesky): B = l l^T, error =
        tr(l^-1 (W^T W)_PP l^-T), which has the outputs summed over already. `given` [g]: what each adds to the error
        once these have gone; they stay.
        """
        candidates, size = columns.shape
        step = None if given is None else self._step(given)
        # Candidates that together have more entries than W^T W share them.
        shared = step is None and candidates * size**2 > len(self._columns) ** 2
        gram = self._columns @ self._columns.T if shared else None
        parts = []
        for some in columns.split(chunk):
            blocks = self.blocks(some)
            if gram is None:
                W = self._columns.index_select(0, some.flatten())
                if step is not None:
                    moved = step[0][:, some.flatten()].T  # [c * s, g]
                    W.addmm_(moved, step[1], alpha=-1)
                    moved = moved.view(*some.shape, -1)
                    blocks -= moved @ moved.mT
                W = W.view(*some.shape, -1)
                G = W @ W.mT
            else:
                G = gram[some.unsqueeze(2), some.unsqueeze(1)]
            factor = torch.linalg.cholesky(blocks)
            both = _divided(factor, _divided(factor, G).mT)
            parts.append(both.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64).clamp(min=0.0))
        return torch.cat(parts)

    def channel_scores(self) -> torch.Tensor:
        """||W_j||^2 / A_jj for every single input [n]; infinite where it is gone already."""
        scores = torch.linalg.vector_norm(self._columns, dim=1).double().square() / self.diagonal
        return scores.masked_fill(~self.alive, math.inf)

    def eliminate(self, columns: torch.Tensor) -> float:
        """Removes `columns` [s], compensates W, returns the exact error that this adds."""
        new, W = self._step(columns)
        self._columns.addmm_(new.T, W, alpha=-1)
        self._columns[columns] = 0.0
        self.alive[columns] = False
        self.diagonal -= new.square().sum(0, dtype=torch.float64)
        self._append(new)
        error = float(W.square().sum(dtype=torch.float64))
        self.error += error
        return error

    def _step(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """l^-1 A_P: [s, n] and l^-1 W_P^T [s, out] of `columns` [s], l the factor of A_PP: what A and W lose with them
        is products of these."""
        L, block = self._L, self._inverse.index_select(0, columns)
        of_columns = L.T.index_select(0, columns)
        if len(columns) < TALL_FROM:
            block.addmm_(of_columns, L, alpha=-1)
        else:
            block -= (L.T @ of_columns.T).T
        factor = torch.linalg.cholesky(block[:, columns])  # `block` is of the current A, [s, n]
        return _divided(factor, block), _divided(factor, self._columns.index_select(0, columns))

    def masked(self) -> torch.Tensor:
        """W with exact zeros in the removed columns, where the arithmetic leaves 1e-17."""
        self._columns[~self.alive] = 0.0
        return self.W.contiguous()

    def _append(self, new: torch.Tensor) -> None:
        end = self._used + len(new)
        if end > len(self._factor):
            room = min(self._factor.shape[1], max(end, 2 * len(self._factor), 64))
            grown = torch.empty(room, self._factor.shape[1], dtype=new.dtype, device=new.device)
            grown[: self._used] = self._L
            self._factor = grown
        self._factor[self._used : end] = new
        self._used = end

    def trial(self) -> Eliminator:
        """An independent copy, to look one move ahead; shares only what is never written."""
        other = object.__new__(Eliminator)
        other._columns, other.alive, other.error = self._columns.clone(), self.alive.clone(), self.error
        other._inverse, other._factor, other._used = self._inverse, self._factor.clone(), self._used
        other.diagonal = self.diagonal.clone()
        return other


def _divided(factor: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """l^-1 B; said from the right, which LAPACK solves in a third of the time."""
    return torch.linalg.solve_triangular(factor.mT, B.mT, upper=True, left=False).mT


@dataclass(frozen=True)
class Selection:
    """What stays (indices, ascending), and W [out, in]: compensated, with zeros in the removed columns; float64, or
    float32 where H was factorised in that."""

    kept: tuple[int, ...]
    W: torch.Tensor
    error: float  # tr((W' - W) H (W' - W)^T) with the damped H
    bias: torch.Tensor | None = None  # [out] to be added to the output, where a criterion compensates by one
    ridge: float | None = None  # W' has the least such error that zeros in these columns can have, with H + ridge I
    factorised: str = ""  # the precision that H was factorised in, where it was
    weighted: bool = False  # `error` is that of R W, not of W


# --------------------------------------------------------------------------------------------------------------- heads


def select_heads(
    W: torch.Tensor,
    inverse: torch.Tensor,
    *,
    kv_groups: int,
    heads_per_group: int,
    head_dim: int,
    keep_groups: int,
    keep_per_group: int,
    kv_cost: float = 2.0,
) -> Selection:
    """Batched Greedy Pruning of attention heads over legal moves.

    A move takes a whole KV group, or one query head from every kept group, so that every kept group ends with the
    same number of query heads (graphs with grouped heads can express nothing else). Every move of both kinds is
    scored with its exact joint error; the cheapest per removed parameter is made, W compensated, A eliminated, until
    `keep_groups` groups of `keep_per_group` heads are left.

    Args:
        W: o_proj [out, kv_groups * heads_per_group * head_dim].
        inverse: damped H^-1 over the same columns, float64 or float32.
        kv_cost: parameters of a group's key and value heads, in units of one query head's (q and o): for the price of
            a move. Keys and values are one matrix row block each, q and o likewise, hence 2 / 2 per head pair.

    Returns:
        Selection whose `kept` are query heads in the dense numbering.
    """
    state = Eliminator(W, inverse)
    groups = {g: list(range(g * heads_per_group, (g + 1) * heads_per_group)) for g in range(kv_groups)}
    columns = _columns_of_heads(head_dim, W.device)
    while True:
        moves: list[tuple[float, list[int]]] = []
        per_group = len(next(iter(groups.values())))
        if len(groups) > keep_groups:
            candidates = list(groups.values())
            scores = state.scores(torch.stack([columns(heads) for heads in candidates])).tolist()
            price = 2 * per_group + kv_cost
            moves += [(s / price, heads) for s, heads in zip(scores, candidates, strict=True)]
        if per_group > keep_per_group:
            score, heads = _one_head_from_each(state, list(groups.values()), columns)
            moves.append((score / (2 * len(groups)), heads))
        if not moves:
            break
        _, heads = min(moves)
        state.eliminate(columns(heads))
        gone = set(heads)
        groups = {g: left for g, members in groups.items() if (left := [h for h in members if h not in gone])}
    kept = tuple(h for g in sorted(groups) for h in groups[g])
    return Selection(kept, state.masked(), state.error)


def walk_heads(
    W: torch.Tensor, inverse: torch.Tensor, *, kv_groups: int, heads_per_group: int, head_dim: int
) -> Iterator[tuple[tuple[int, int], tuple[int, ...], float]]:
    """Every legal head structure, with the query heads that it keeps and their exact error.

    KV groups go one by one, the cheapest first; from each number of groups a branch takes one query head after another
    from all of them. `select_heads` mixes both kinds of moves and may find a little less error; the walk shares its
    steps among all structures, where a selection each would repeat them.

    Args:
        W, inverse: as for `select_heads`.

    Yields:
        ((KV groups, heads per group), kept query heads, error), the dense structure first.
    """
    columns = _columns_of_heads(head_dim, W.device)
    state = Eliminator(W, inverse)
    groups = [list(range(g * heads_per_group, (g + 1) * heads_per_group)) for g in range(kv_groups)]
    while True:
        branch, inner = state.trial(), groups
        for per_group in range(heads_per_group, 0, -1):
            if per_group < heads_per_group:
                _, taken = _one_head_from_each(branch, inner, columns)
                branch.eliminate(columns(taken))
                inner = [[h for h in heads if h not in taken] for heads in inner]
            yield (len(groups), per_group), tuple(h for heads in inner for h in heads), branch.error
        if len(groups) == 1:
            return
        cheapest = int(state.scores(torch.stack([columns(heads) for heads in groups])).argmin())
        state.eliminate(columns(groups[cheapest]))
        groups = [heads for i, heads in enumerate(groups) if i != cheapest]


def _columns_of_heads(head_dim: int, device: torch.device) -> Callable[[Sequence[int]], torch.Tensor]:
    """Heads, of which there may be none -> indices of their columns."""
    steps = torch.arange(head_dim, device=device)
    return lambda heads: (
        torch.tensor(heads, dtype=torch.long, device=device).unsqueeze(1) * head_dim + steps
    ).flatten()


def _one_head_from_each(
    state: Eliminator, groups: list[list[int]], columns: Callable[[Sequence[int]], torch.Tensor]
) -> tuple[float, list[int]]:
    """The cheapest way to take one query head from every group, with its exact joint error.

    All combinations are scored where there are few. Otherwise one is built head by head, each the cheapest given those
    already taken (the errors of successive eliminations add up to the joint error), and improved by swapping one
    group's head at a time while that helps.
    """
    if math.prod(len(heads) for heads in groups) <= ENUMERATION_LIMIT:
        combinations = [list(c) for c in itertools.product(*groups)]
        scores = state.scores(torch.stack([columns(c) for c in combinations]), chunk=64)
        best = int(scores.argmin())
        return float(scores[best]), combinations[best]
    trial, chosen, open_groups = state.trial(), {}, dict(enumerate(groups))
    while open_groups:
        candidates = [(g, h) for g, heads in open_groups.items() for h in heads]
        scores = trial.scores(torch.stack([columns([h]) for _, h in candidates]))
        group, head = candidates[int(scores.argmin())]
        trial.eliminate(columns([head]))
        chosen[group] = head
        del open_groups[group]
    taken = [chosen[g] for g in range(len(groups))]
    score = trial.error - state.error
    seen = {tuple(taken)}  # what went round in a circle would never end
    improved = True
    while improved:
        improved = False
        for g, heads in enumerate(groups):
            others = columns([*taken[:g], *taken[g + 1 :]])
            added = state.scores(torch.stack([columns([h]) for h in heads]), given=others)
            best = int(added.argmin())
            saved = float(added[heads.index(taken[g])] - added[best])
            swapped = [*taken[:g], heads[best], *taken[g + 1 :]]
            if saved > NOISE[state.W.dtype] * score and tuple(swapped) not in seen:
                score, taken, improved = score - saved, swapped, True
                seen.add(tuple(taken))
    return score, taken


# ------------------------------------------------------------------------------------------------------------ channels


def usual_group_sizes(channels: int) -> tuple[int, int]:
    """64 and 1 for up to 1,536 channels, and in proportion for more: the same share of them goes at once."""
    scale = max(1.0, channels / 1536)
    return round(64 * scale), round(scale)


def group_sizes(remove: int, start: int, end: int) -> list[int]:
    """Dynamic Group Size: how many channels go at once, from `start` down to `end`, summing to `remove`.

    The size shrinks linearly with the share of channels already removed: coarse while many cheap ones are left, fine
    where a wrong choice costs most (the paper shrinks it towards the end of each matrix; section 3.3).
    """
    sizes: list[int] = []
    done = 0
    while done < remove:
        size = max(end, round(start + (end - start) * done / remove), 1)
        sizes.append(min(size, remove - done))
        done += sizes[-1]
    return sizes


def select_channels(
    W: torch.Tensor, inverse: torch.Tensor, *, keep: int, group_size_start: int, group_size_end: int
) -> Selection:
    """Greedy removal of FFN channels in groups of shrinking size, with compensation over all that is kept.

    Args:
        W: down_proj [out, channels].
        inverse: damped H^-1 [channels, channels], float64 or float32.
        keep: channels that stay. Group sizes 1 and 1 are exact one-at-a-time greedy.
    """
    state = Eliminator(W, inverse, W.shape[1] - keep)
    for size in group_sizes(W.shape[1] - keep, group_size_start, group_size_end):
        # A stable sort makes ties (dead channels) go in index order, on every device alike.
        chosen = state.channel_scores().sort(stable=True).indices[:size]
        state.eliminate(chosen)
    kept = tuple(state.alive.nonzero().flatten().tolist())
    return Selection(kept, state.masked(), state.error)


def picked(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """x[..., columns], in a third of the time."""
    return x.gather(-1, columns.expand(*x.shape[:-1], -1))


def squared_error(difference: torch.Tensor, H: torch.Tensor) -> float:
    """tr(D H D^T), the mean squared length of D x: D [out, in], H [in, in]."""
    return max(float(((difference @ H) * difference).sum()), 0.0)


def mean_square(W: torch.Tensor, H: torch.Tensor, columns: torch.Tensor | None = None) -> float:
    """tr(W H W^T), the output's mean square, of some inputs alone (indices) or of all; of wide ones by products in
    float32, as those of H were."""
    wide = len(W) * len(H) >= SINGLE_FROM**2
    if columns is not None:
        W = picked(W, columns)
    n = W.shape[1]
    if not wide:
        return squared_error(W.to(H), H if columns is None else H[columns][:, columns])
    single, total = W.float(), 0.0
    for start in range(0, n, ROWS):  # of H, which is symmetric, what is left of its diagonal counts twice
        below, own = slice(start, None), slice(start, start + ROWS)
        rows = (H[own, below] if columns is None else picked(H[columns[own]], columns[below])).float()
        rows[:, ROWS:] *= 2
        product = single[:, below] @ rows.T
        total += float(product.mul_(single[:, own]).sum(dtype=torch.float64))
    return total


class Errors(NamedTuple):
    """Mean squares of outputs, in units of H."""

    before: float  # ||(W' - W) X||^2 of plain removal
    after: float  # of the selection's W', and of its bias if it has any
    power: float  # ||W X||^2


def removal_errors(
    W: torch.Tensor, selection: Selection, columns: torch.Tensor, H: torch.Tensor, mean: torch.Tensor | None = None
) -> Errors:
    """What a selection adds to the output, from H = X X^T / tokens (without a bias: any scale), undamped.

    Args:
        W, H: [out, in] and [in, in], float64.
        columns: indices of what stays.
        mean: [in], of the inputs; for the bias.
    """
    stays = torch.zeros(W.shape[1], dtype=torch.bool, device=W.device)
    stays[columns] = True
    gone = (~stays).nonzero().flatten()
    before = max(mean_square(W, H, gone), 0.0)
    if selection.ridge is not None and selection.bias is None:
        return Errors(before, *_of_optimum(W, selection, columns, gone, H, selection.ridge))
    D = selection.W - W
    moved = D.any(0)  # where nothing is compensated only what went
    after = squared_error(D, H) if bool(moved.all()) else squared_error(D[:, moved], H[moved][:, moved])
    if selection.bias is not None:
        assert mean is not None
        after += float(selection.bias @ (2 * D @ mean + selection.bias))
    return Errors(before, max(after, 0.0), mean_square(W, H))


def _of_optimum(
    W: torch.Tensor, selection: Selection, columns: torch.Tensor, gone: torch.Tensor, H: torch.Tensor, ridge: float
) -> tuple[float, float]:
    """(error, power) of a W' with the least tr(D (H + ridge I) D^T), D = W' - W, that zeros in `gone` can have.

    D (H + ridge I) is zero outside of `gone`, where W' is not: all products with H that W and D need are those of W' in
    what stays, and of D in the few columns that are gone. Columns of inputs that never fired may be anything.
    """
    fired = H.diagonal() > 0
    squares, inner = (torch.zeros(W.shape[1], dtype=torch.float64, device=W.device) for _ in range(2))
    rows = CACHED_ROWS if W.device.type == "cpu" else len(W)
    for now, old in zip(selection.W.split(rows), W.split(rows), strict=True):
        D = now - old
        squares += D.square().sum(0)
        inner += D.mul_(now).sum(0)
    if selection.weighted:  # and the error that was found is not that of W
        of_gone = H[gone].to(torch.float32 if len(H) >= SINGLE_FROM else torch.float64)
        D = (selection.W - W).to(of_gone)
        found = float((D @ of_gone.T).mul_(D[:, gone]).sum(dtype=torch.float64))
        squares[gone] = 0.0
    else:
        found = selection.error
    after = max(found - ridge * float(squares[fired].sum()), 0.0)
    return after, mean_square(selection.W, H, columns) + after + 2 * ridge * float(inner[fired].sum())
