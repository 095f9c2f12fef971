"""SlimGPT's mathematics on plain tensors (arXiv 2412.18110, sections 3.2-3.4; Optimal Brain Surgeon underneath).

An output matrix W [out, in] reads inputs X [in, tokens]; H = X X^T / tokens, damped. Removing the input columns R and
re-fitting the others costs, with A = H^-1 restricted to what is still there,

    error(R) = tr(W_R (A_RR)^-1 W_R^T),          W <- W - W_R (A_RR)^-1 A_R:,      A <- A - A_:R (A_RR)^-1 A_R:

which is the exact least-squares optimum. This module imports torch and nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")

ENUMERATION_LIMIT = 256  # combinations of one head per group that are still scored one by one
DAMPING_RETRIES = 6
SINGLE_FROM = 2048  # inputs: from here on a factor is tried in float32 first; smaller ones take no time in float64
SINGLE_RESIDUAL = 1e-3  # of A in float32, at most: what compensation loses to it is of second order
ROWS = 512  # of a matrix that are converted at a time: the widest are gigabytes


class NotPositiveDefiniteError(RuntimeError):
    """H stayed singular even with the largest damping that was tried."""


# ----------------------------------------------------------------------------------------------------- damped inverse


class DampedInverse(NamedTuple):
    """(H + ridge I)^-1."""

    inverse: torch.Tensor  # [n, n] float64, or float32 where that was found good enough
    dead: torch.Tensor  # [n] bool, inputs that never fired: as if of size one, so that removing them touches nothing
    damping: float  # that was used, as a share of the mean diagonal
    ridge: float


def solved(H: torch.Tensor, damping: float, solve: Callable[[DampedInverse], T]) -> tuple[T, DampedInverse]:
    """`solve` by the damped inverse of H: again by one in float64, where by one in float32 a Cholesky factor fails."""
    found = damped_inverse(H, damping)
    try:
        return solve(found), found
    except torch.linalg.LinAlgError:
        if found.inverse.dtype == torch.float64:
            raise
    found = damped_inverse(H, damping, single=False)
    return solve(found), found


def damped_inverse(H: torch.Tensor, damping: float, *, single: bool = True) -> DampedInverse:
    """Inverse of H + lambda I, lambda = damping * mean(diag H), ten times more whenever Cholesky fails.

    Of SINGLE_FROM inputs and more it is computed in float32 first, and kept where (H + lambda I) A v is v within
    SINGLE_RESIDUAL for random v, by H as it is; else in float64, as for fewer inputs.

    Args:
        H: [n, n], symmetric, float64.
        damping: share of the mean diagonal.
        single: whether float32 will do.
    """
    diagonal = H.diagonal().double()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    for _ in range(DAMPING_RETRIES):
        ridge = damping * mean
        raised = diagonal.masked_fill(dead, 1.0) + ridge
        if single and len(H) >= SINGLE_FROM and (found := _inverse_in_single(H, raised)) is not None:
            return DampedInverse(found, dead, damping, ridge)
        damped = H.double().clone()
        damped.diagonal().copy_(raised)
        factor, failed = torch.linalg.cholesky_ex(damped)
        del damped  # as large as the factor and the inverse
        if not bool(failed):
            return DampedInverse(torch.cholesky_inverse(factor), dead, damping, ridge)
        damping *= 10
    raise NotPositiveDefiniteError(f"H of size {len(H)} is not positive definite, even with damping {damping / 10:g}")


def _inverse_in_single(H: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor | None:
    """Inverse of H with this `diagonal` [n] by a float32 Cholesky, None where that is not accurate enough.

    Scaled to a unit diagonal, S H S: activations of one channel may be a thousand times those of another, and it is
    only what then is left of H's condition that costs digits.
    """
    n, scale = len(H), diagonal.rsqrt()
    scaled = torch.empty(n, n, dtype=torch.float32, device=H.device)
    single = scale.float()
    for start in range(0, n, ROWS):
        rows = slice(start, start + ROWS)
        scaled[rows].copy_(H[rows]).mul_(single[rows, None]).mul_(single)
    scaled.diagonal().fill_(1.0)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    del scaled
    if bool(failed):
        return None
    inverse = torch.cholesky_inverse(factor)  # S^-1 A S^-1
    del factor
    v = torch.randint(2, (n, 1), generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).to(H)
    x = (inverse @ v.float()).double() * scale[:, None]
    back = scale[:, None] * (H @ x + (diagonal - H.diagonal())[:, None] * x)
    if not float((back - v).norm()) <= SINGLE_RESIDUAL * float(v.norm()):  # NaN is not accurate enough either
        return None
    for start in range(0, n, ROWS):  # of which the second product finds in the cache what the first has left there
        inverse[start : start + ROWS].mul_(single[start : start + ROWS, None]).mul_(single)
    return inverse


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
        self._columns = W.to(inverse.dtype).T.clone(memory_format=torch.contiguous_format)
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

    def scores(self, columns: torch.Tensor, chunk: int = 256) -> torch.Tensor:
        """Exact error of removing each candidate with optimal compensation: columns [c, s] -> [c] float64.

        One batched Cholesky over all candidates (the paper's grouped Cholesky): B = l l^T, error =
        tr(l^-1 (W^T W)_PP l^-T), which has the outputs summed over already.
        """
        candidates, size = columns.shape
        # Candidates that together have more entries than W^T W share them.
        gram = self._columns @ self._columns.T if candidates * size**2 > len(self._columns) ** 2 else None
        parts = []
        for some in columns.split(chunk):
            factor = torch.linalg.cholesky(self.blocks(some))
            if gram is None:
                W = self._columns[some]  # [c, s, out]
                G = W @ W.mT
            else:
                G = gram[some.unsqueeze(2), some.unsqueeze(1)]
            reduced = torch.linalg.solve_triangular(factor, G, upper=False)
            both = torch.linalg.solve_triangular(factor, reduced.mT, upper=False)
            parts.append(both.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64).clamp(min=0.0))
        return torch.cat(parts)

    def channel_scores(self) -> torch.Tensor:
        """||W_j||^2 / A_jj for every single input [n]; infinite where it is gone already."""
        scores = torch.linalg.vector_norm(self._columns, dim=1).double().square() / self.diagonal
        return scores.masked_fill(~self.alive, math.inf)

    def eliminate(self, columns: torch.Tensor) -> float:
        """Removes `columns` [s], compensates W, returns the exact error that this adds."""
        L = self._L
        block = torch.addmm(self._inverse[columns], L[:, columns].T, L, alpha=-1)  # current A_P:, [s, n]
        factor = torch.linalg.cholesky(block[:, columns])
        new = torch.linalg.solve_triangular(factor, block, upper=False)  # l^-1 A_P:, [s, n]
        W = torch.linalg.solve_triangular(factor, self._columns[columns], upper=False)  # l^-1 W_P^T, [s, out]
        self._columns.addmm_(new.T, W, alpha=-1)
        self._columns[columns] = 0.0
        self.alive[columns] = False
        self.diagonal -= new.square().sum(0, dtype=torch.float64)
        self._append(new)
        error = float(W.square().sum(dtype=torch.float64))
        self.error += error
        return error

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
        inverse: damped H^-1 over the same columns, float64.
        kv_cost: parameters of a group's key and value heads, in units of one query head's (q and o): for the price of
            a move. Keys and values are one matrix row block each, q and o likewise, hence 2 / 2 per head pair.

    Returns:
        Selection whose `kept` are query heads in the dense numbering.
    """
    state = Eliminator(W, inverse)
    groups = {g: list(range(g * heads_per_group, (g + 1) * heads_per_group)) for g in range(kv_groups)}

    def columns(heads: Sequence[int]) -> torch.Tensor:
        steps = torch.arange(head_dim, device=W.device)
        return (torch.tensor(list(heads), device=W.device).unsqueeze(1) * head_dim + steps).flatten()

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
    steps = torch.arange(head_dim, device=W.device)

    def columns(heads: Sequence[int]) -> torch.Tensor:
        return (torch.tensor(list(heads), device=W.device).unsqueeze(1) * head_dim + steps).flatten()

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


def _one_head_from_each(state: Eliminator, groups: list[list[int]], columns) -> tuple[float, list[int]]:
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
    improved = True
    while improved:
        improved = False
        for g, heads in enumerate(groups):
            swaps = [[*taken[:g], h, *taken[g + 1 :]] for h in heads if h != taken[g]]
            if not swaps:
                continue
            scores = state.scores(torch.stack([columns(s) for s in swaps]), chunk=16)
            best = int(scores.argmin())
            if float(scores[best]) < score * (1 - 1e-9):
                score, taken, improved = float(scores[best]), swaps[best], True
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
        inverse: damped H^-1 [channels, channels], float64.
        keep: channels that stay. Group sizes 1 and 1 are exact one-at-a-time greedy.
    """
    state = Eliminator(W, inverse, W.shape[1] - keep)
    for size in group_sizes(W.shape[1] - keep, group_size_start, group_size_end):
        # A stable sort makes ties (dead channels) go in index order, on every device alike.
        chosen = state.channel_scores().sort(stable=True).indices[:size]
        state.eliminate(chosen)
    kept = tuple(state.alive.nonzero().flatten().tolist())
    return Selection(kept, state.masked(), state.error)


def squared_error(difference: torch.Tensor, H: torch.Tensor) -> float:
    """tr(D H D^T), the mean squared length of D x: D [out, in], H [in, in]."""
    return max(float(((difference @ H) * difference).sum()), 0.0)


def mean_square(W: torch.Tensor, H: torch.Tensor) -> float:
    """tr(W H W^T), the output's mean square; of wide ones by products in float32, as those of H were."""
    if len(W) * len(H) < SINGLE_FROM**2:
        return squared_error(W, H)
    single, total = W.float(), 0.0
    for start in range(0, len(H), ROWS):  # of H, which is symmetric, what is left of its diagonal counts twice
        rows = H[start:, start : start + ROWS].float()
        rows[ROWS:] *= 2
        product = single[:, start:] @ rows
        total += float(product.mul_(single[:, start : start + ROWS]).sum(dtype=torch.float64))
    return total


def optimum_error(
    D: torch.Tensor, rows: torch.Tensor, diagonal: torch.Tensor, gone: torch.Tensor, ridge: float
) -> float:
    """tr(D H D^T) of the D that has the least tr(D (H + ridge I) D^T) for its columns in `gone`.

    D (H + ridge I) is zero in all other columns then, so of D H only the few columns in `gone` need be computed.

    Args:
        D: [out, n], of which columns that never fired may be anything.
        rows: of H, those in `gone`; diagonal: of H.
        gone: indices.
    """
    rest = diagonal > 0
    rest[gone] = False
    product = (D.to(rows) @ rows.T).mul_(D[:, gone])
    return max(float(product.sum(dtype=torch.float64)) - ridge * float(D.square().sum(0)[rest].sum()), 0.0)


def removal_errors(
    W: torch.Tensor, selection: Selection, columns: torch.Tensor, H: torch.Tensor, mean: torch.Tensor | None = None
) -> tuple[float, float]:
    """||(W' - W) X + b 1^T||^2 / ||W X||^2 of plain removal, and of the selection's W' and b (its bias, if any), from
    H = X X^T / tokens (without a bias: any scale), undamped; 0.0 where W X is zero.

    Args:
        W, H: [out, in] and [in, in], float64.
        columns: indices of what stays.
        mean: [in], of the inputs; for the bias.
    """
    total = mean_square(W, H)
    if total <= 0:
        return 0.0, 0.0
    stays = torch.zeros(W.shape[1], dtype=torch.bool, device=W.device)
    stays[columns] = True
    gone = (~stays).nonzero().flatten()
    rows = H[gone].to(torch.float32 if len(H) >= SINGLE_FROM else torch.float64)  # nothing cancels in products with it
    plain = W[:, gone].to(rows)
    before = float((plain @ rows[:, gone]).mul_(plain).sum(dtype=torch.float64))
    if selection.ridge is not None and selection.weighted:
        after = optimum_error(selection.W - W, rows, H.diagonal(), gone, selection.ridge)
    elif selection.ridge is not None:  # what the damping adds to it was found with it
        pairs = zip(selection.W.split(ROWS), W.split(ROWS), strict=True)
        squares = sum((now - old).square_().sum(0) for now, old in pairs)[H.diagonal() > 0]
        after = max(selection.error - selection.ridge * float(squares.sum()), 0.0)
    else:
        D = selection.W - W
        moved = D.any(0)  # where nothing is compensated only what went
        after = squared_error(D, H) if bool(moved.all()) else squared_error(D[:, moved], H[moved][:, moved])
    if selection.bias is not None:
        assert mean is not None
        after += float(selection.bias @ (2 * (selection.W - W) @ mean + selection.bias))
    return max(before, 0.0) / total, max(after, 0.0) / total
