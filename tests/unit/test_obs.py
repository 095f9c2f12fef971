"""SlimGPT's mathematics against brute force in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

from slimexport.pruning import inverse as inverses
from slimexport.pruning import obs
from slimexport.pruning.inverse import damped_inverse


def problem(out: int, n: int, tokens: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W, correlated inputs' H (damped), and H^-1."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g, dtype=torch.float64)
    X = mix @ torch.randn(n, tokens, generator=g, dtype=torch.float64)
    H = X @ X.T / tokens
    inverse, _, used, _ = damped_inverse(H, 0.01)
    damped = H + used * H.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    return torch.randn(out, n, generator=g, dtype=torch.float64), damped, inverse


def least_squares(W: torch.Tensor, H: torch.Tensor, kept: list[int]) -> tuple[torch.Tensor, float]:
    """The best W' with zeros outside `kept`, from the normal equations, and its error tr(D H D^T)."""
    best = torch.zeros_like(W)
    best[:, kept] = torch.linalg.solve(H[kept][:, kept], (W @ H[:, kept]).T).T
    D = best - W
    return best, float(((D @ H) * D).sum())


def columns_of(heads: list[int], head_dim: int) -> list[int]:
    return [h * head_dim + d for h in heads for d in range(head_dim)]


def test_score_of_every_group_of_columns_is_the_least_squares_error() -> None:
    W, H, inverse = problem(5, 12)
    state = obs.Eliminator(W, inverse)
    candidates = [list(c) for c in itertools.combinations(range(12), 3)]
    scores = state.scores(torch.tensor(candidates), chunk=50)
    expected = [least_squares(W, H, [j for j in range(12) if j not in c])[1] for c in candidates]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-10)


def test_scores_stay_exact_while_columns_go() -> None:
    """Also those of a copy, apart from which the original goes on."""
    W, H, inverse = problem(5, 12)
    state = obs.Eliminator(W, inverse)
    gone: list[int] = []
    for group in ([3, 7], [0], [11, 2]):
        for of in (state, state.trial()):
            rest = [j for j in range(12) if j not in gone]
            pairs = [list(c) for c in itertools.combinations(rest, 2)]
            expected = [least_squares(W, H, [j for j in rest if j not in pair])[1] - of.error for pair in pairs]
            scores = of.scores(torch.tensor(pairs))
            torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-9)
            some = torch.tensor(rest[1:3])
            others = [pair for pair in pairs if not {*pair} & {*some.tolist()}]
            expected = [
                least_squares(W, H, [j for j in rest if j not in pair and j not in some])[1]
                - least_squares(W, H, [j for j in rest if j not in some])[1]
                for pair in others
            ]
            scores = of.scores(torch.tensor(others), chunk=5, given=some)
            torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-9)
        other = state.trial()
        other.scores(torch.tensor(pairs))
        other.eliminate(torch.tensor(rest[:2]))  # of no effect on the original
        state.eliminate(torch.tensor(group))
        gone += group


@pytest.mark.parametrize(("channels", "expected"), [(8, (64, 1)), (1536, (64, 1)), (5632, (235, 4)), (11008, (459, 7))])
def test_wide_matrices_lose_the_same_share_at_once(channels: int, expected: tuple[int, int]) -> None:
    assert obs.usual_group_sizes(channels) == expected


def test_successive_eliminations_are_the_joint_least_squares_solution() -> None:
    W, H, inverse = problem(5, 12)
    state = obs.Eliminator(W, inverse)
    for group in ([3, 7], [0], [11, 2, 5]):
        before = state.error
        promised = float(state.scores(torch.tensor([group]))[0])
        assert state.eliminate(torch.tensor(group)) == pytest.approx(promised, rel=1e-9)
        assert state.error == pytest.approx(before + promised, rel=1e-12)
    best, error = least_squares(W, H, [1, 4, 6, 8, 9, 10])
    torch.testing.assert_close(state.W, best, rtol=1e-7, atol=1e-9)
    assert state.error == pytest.approx(error, rel=1e-8)


def test_factor_grows_past_its_first_allocation() -> None:
    W, H, inverse = problem(4, 200, tokens=600)
    selection = obs.select_channels(W, inverse, keep=20, group_size_start=16, group_size_end=1)
    best, error = least_squares(W, H, list(selection.kept))
    torch.testing.assert_close(selection.W, best, rtol=1e-6, atol=1e-7)
    assert selection.error == pytest.approx(error, rel=1e-6)


def brute_force_heads(W, H, groups, per_group, head_dim, keep_groups, keep_per_group):  # type: ignore[no-untyped-def]
    """The greedy of `select_heads`, with every legal move scored by solving the least-squares problem anew."""
    members = {g: list(range(g * per_group, (g + 1) * per_group)) for g in range(groups)}
    removed: list[int] = []
    while True:
        now = len(next(iter(members.values())))
        base = least_squares(W, H, [c for c in range(W.shape[1]) if c not in columns_of(removed, head_dim)])[1]
        moves = []
        if len(members) > keep_groups:
            moves += [(heads, 2 * now + 2) for heads in members.values()]
        if now > keep_per_group:
            moves += [(list(c), 2 * len(members)) for c in itertools.product(*members.values())]
        if not moves:
            return removed, base
        priced = []
        for heads, price in moves:
            gone = columns_of(removed + heads, head_dim)
            error = least_squares(W, H, [c for c in range(W.shape[1]) if c not in gone])[1]
            priced.append(((error - base) / price, heads))
        _, heads = min(priced)
        removed += heads
        members = {g: left for g, m in members.items() if (left := [h for h in m if h not in heads])}


@pytest.mark.parametrize(
    ("groups", "per_group", "keep_groups", "keep_per_group"),
    [(3, 3, 3, 2), (3, 3, 2, 3), (3, 3, 2, 1), (4, 1, 2, 1), (1, 4, 1, 2), (2, 2, 1, 1), (2, 3, 2, 3)],
)
@pytest.mark.parametrize("limit", [obs.ENUMERATION_LIMIT, 0])
def test_heads_equal_brute_force(groups, per_group, keep_groups, keep_per_group, limit, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(obs, "ENUMERATION_LIMIT", limit)
    head_dim = 2
    for seed in range(3):
        W, H, inverse = problem(5, groups * per_group * head_dim, seed=seed)
        removed, error = brute_force_heads(W, H, groups, per_group, head_dim, keep_groups, keep_per_group)
        got = obs.select_heads(
            W, inverse, kv_groups=groups, heads_per_group=per_group, head_dim=head_dim,
            keep_groups=keep_groups, keep_per_group=keep_per_group,
        )  # fmt: skip
        best, own_error = least_squares(W, H, columns_of(list(got.kept), head_dim))
        torch.testing.assert_close(got.W, best, rtol=1e-6, atol=1e-8)
        assert got.error == pytest.approx(own_error, rel=1e-7, abs=1e-9)
        assert len(got.kept) == keep_groups * keep_per_group
        if limit:  # without enumeration the choice is a greedy one and may differ from the best combination
            assert set(got.kept) == set(range(groups * per_group)) - set(removed)
            assert got.error == pytest.approx(error, rel=1e-7, abs=1e-9)


def test_every_kept_group_keeps_the_same_number_of_heads() -> None:
    W, _, inverse = problem(4, 4 * 4 * 2, seed=5)
    got = obs.select_heads(W, inverse, kv_groups=4, heads_per_group=4, head_dim=2, keep_groups=3, keep_per_group=2)
    assert sorted([h // 4 for h in got.kept].count(g) for g in range(4)) == [0, 2, 2, 2]


def exact_greedy(W: torch.Tensor, H: torch.Tensor, keep: int) -> list[int]:
    kept = list(range(W.shape[1]))
    while len(kept) > keep:
        errors = [least_squares(W, H, [j for j in kept if j != c])[1] for c in kept]
        kept.pop(min(range(len(kept)), key=errors.__getitem__))
    return kept


def test_group_size_one_is_exact_greedy() -> None:
    for seed in range(4):
        W, H, inverse = problem(5, 14, seed=seed)
        got = obs.select_channels(W, inverse, keep=6, group_size_start=1, group_size_end=1)
        assert list(got.kept) == exact_greedy(W, H, 6)
        torch.testing.assert_close(got.W, least_squares(W, H, list(got.kept))[0], rtol=1e-6, atol=1e-8)


def test_group_sizes_shrink_and_add_up() -> None:
    sizes = obs.group_sizes(1000, 64, 1)
    assert sum(sizes) == 1000
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 64
    assert sizes[-1] == 1
    assert obs.group_sizes(0, 8, 1) == []
    assert obs.group_sizes(5, 1, 1) == [1] * 5


def test_compensation_never_loses_to_plain_removal() -> None:
    for seed in range(10):
        W, H, inverse = problem(6, 16, seed=seed)
        raw = H - 0.01 / 1.01 * H.diagonal().mean() * torch.eye(16, dtype=torch.float64)  # undamped
        got = obs.select_channels(W, inverse, keep=8, group_size_start=4, group_size_end=1)
        plain, compensated, _ = obs.removal_errors(W, got, torch.tensor(got.kept), raw)
        assert compensated <= plain + 1e-12


def test_removal_errors_are_those_of_the_outputs() -> None:
    g = torch.Generator().manual_seed(4)
    W, other, X = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((3, 5), (3, 5), (5, 40)))
    bias = torch.randn(3, generator=g, dtype=torch.float64)
    H, columns = X @ X.T / 40, torch.tensor([1, 2, 4])
    plain = W.index_fill(1, torch.tensor([0, 3]), 0.0)

    def error(changed: torch.Tensor, b: torch.Tensor | None = None) -> float:
        moved = (changed - W) @ X + (0.0 if b is None else b[:, None])
        return float(moved.square().sum()) / 40

    for changed, b in ((other, None), (other, bias), (plain, None), (plain, bias)):
        selection = obs.Selection((1, 2, 4), changed, 0.0, b)
        found = obs.removal_errors(W, selection, columns, H, X.mean(1))
        assert found == pytest.approx((error(plain), error(changed, b), error(torch.zeros_like(W))), rel=1e-10)
        with_ridge = dataclasses.replace(selection, ridge=0.0)
        assert b is None or obs.removal_errors(W, with_ridge, columns, H, X.mean(1)) == found


def test_the_error_of_an_optimum_is_that_of_any_other_matrix() -> None:
    """By the columns that went, whether or not errors were weighted, and with an input that never fired."""
    W, H, _ = problem(5, 14, seed=6)
    H[11] = H[:, 11] = 0.0
    found = damped_inverse(H, 0.05)
    R = torch.randn(5, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for left in (torch.eye(5, dtype=torch.float64), R):
        best = obs.select_channels(
            left @ W.masked_fill(found.dead, 0.0), found.inverse, keep=8, group_size_start=2, group_size_end=1
        )
        changed = torch.linalg.solve(left, best.W)
        kept = torch.tensor(best.kept)
        exact = obs.removal_errors(W, obs.Selection(best.kept, changed, 0.0), kept, H)
        optimum = obs.Selection(best.kept, changed, best.error, ridge=found.ridge, weighted=left is R)
        fast = obs.removal_errors(W, optimum, kept, H)
        assert fast == pytest.approx(exact, rel=1e-9)
        assert 0 < fast[1] < fast[0]
        of_any = obs.removal_errors(W, dataclasses.replace(optimum, weighted=True), kept, H)
        assert of_any == pytest.approx(exact, rel=1e-9)


def with_columns(head_dim: int):  # type: ignore[no-untyped-def]
    return lambda heads: torch.tensor(columns_of(heads, head_dim))


@pytest.mark.parametrize("seed", range(4))
def test_a_head_from_each_group_is_the_best_that_one_swap_reaches(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(obs, "ENUMERATION_LIMIT", 0)
    W, _, inverse = problem(5, 4 * 4 * 2, seed=seed)
    state, columns = obs.Eliminator(W, inverse), with_columns(2)
    state.eliminate(columns([5]))
    groups = [[h for h in range(4 * g, 4 * g + 4) if h != 5] for g in range(4)]
    score, taken = obs._one_head_from_each(state, groups, columns)
    assert all(head in heads for head, heads in zip(taken, groups, strict=True))
    swaps = [[*taken[:g], h, *taken[g + 1 :]] for g, heads in enumerate(groups) for h in heads]
    joint = state.scores(torch.stack([columns(heads) for heads in swaps]))
    assert score == pytest.approx(float(state.scores(columns(taken)[None])), rel=1e-9)
    assert score <= float(joint.min()) * (1 + 1e-8)


@pytest.mark.parametrize("seed", range(8))
def test_heads_that_are_all_alike_are_not_swapped_for_ever(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """In float32 one or the other is cheaper by what was rounded, and not always the same one."""
    monkeypatch.setattr(obs, "ENUMERATION_LIMIT", 0)
    g = torch.Generator().manual_seed(seed)
    turned = [torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64)).Q for _ in range(16)]
    H = torch.block_diag(*turned)
    H = H @ torch.kron(torch.eye(16) + 0.5, torch.eye(4)).double() @ H.T
    W = torch.cat([torch.eye(4, dtype=torch.float64) @ Q.T for Q in turned], 1)
    state = obs.Eliminator(W, torch.linalg.inv(H).float())
    asked, scores = 0, obs.Eliminator.scores

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal asked
        asked += 1
        assert asked < 500
        return scores(*args, **options)

    monkeypatch.setattr(obs.Eliminator, "scores", counted)
    groups = [list(range(4 * g, 4 * g + 4)) for g in range(4)]
    score, taken = obs._one_head_from_each(state, groups, with_columns(4))
    exact = obs.Eliminator(W, torch.linalg.inv(H)).scores(with_columns(4)(taken)[None])
    assert score == pytest.approx(float(exact), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------- float32


def wide(spread: float, seed: int = 8) -> torch.Tensor:
    """H of 96 inputs, correlated, whose sizes go from one to `spread`."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(96, 96, generator=g, dtype=torch.float64) @ torch.randn(96, 300, generator=g, dtype=torch.float64)
    X *= torch.logspace(0, math.log10(spread), 96, dtype=torch.float64)[:, None]
    return X @ X.T / 300


@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_a_wide_one_is_factorised_in_float32(monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
    """And removes the same channels, with nearly the least error, however unlike the sizes of the inputs are."""
    H = wide(spread)
    W = torch.randn(7, 96, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    monkeypatch.setattr(inverses, "SINGLE_FROM", 1000)
    exact = damped_inverse(H, 1e-3)
    monkeypatch.setattr(inverses, "SINGLE_FROM", 64)
    found = damped_inverse(H, 1e-3)
    assert (exact.inverse.dtype, found.inverse.dtype) == (torch.float64, torch.float32)
    assert (found.damping, found.ridge) == (exact.damping, exact.ridge)
    scale = exact.inverse.diagonal().sqrt()
    torch.testing.assert_close(
        found.inverse.double() / scale / scale[:, None],
        exact.inverse / scale / scale[:, None], rtol=0, atol=1e-3,
    )  # fmt: skip
    of = [obs.select_channels(W, i, keep=60, group_size_start=8, group_size_end=2) for i in (exact[0], found[0])]
    assert of[0].kept == of[1].kept
    assert of[1].W.dtype == torch.float32
    columns = torch.tensor(of[0].kept)
    exactly, nearly = (obs.removal_errors(W, selection, columns, H) for selection in of)
    assert nearly == pytest.approx(exactly, rel=1e-5)
    for single_from in (64, 16):  # a matrix that is narrower than the factor, and one that is not
        monkeypatch.setattr(obs, "SINGLE_FROM", single_from)
        for weighted in (False, True):
            optimum = dataclasses.replace(of[1], ridge=found.ridge, weighted=weighted)
            by_optimum = obs.removal_errors(W, optimum, columns, H)
            assert by_optimum.after == pytest.approx(exactly.after, rel=1e-2)
            assert (by_optimum.before, by_optimum.power) == pytest.approx((exactly.before, exactly.power), rel=1e-5)


def test_the_mean_square_of_a_wide_output(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(7, 96, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    H = wide(1e3)
    exact = float(((W @ H) * W).sum())
    monkeypatch.setattr(obs, "SINGLE_FROM", 64)
    monkeypatch.setattr(obs, "ROWS", 40)
    assert obs.mean_square(W, H) == pytest.approx(exact, rel=1e-5)
    some = torch.arange(1, 96, 2)
    exact = float(((W[:, some] @ H[some][:, some]) * W[:, some]).sum())
    monkeypatch.setattr(obs, "SINGLE_FROM", 16)
    assert obs.mean_square(W, H, some) == pytest.approx(exact, rel=1e-5)


def test_keeping_all_changes_nothing() -> None:
    W, _, inverse = problem(5, 12)
    got = obs.select_channels(W, inverse, keep=12, group_size_start=4, group_size_end=1)
    assert torch.equal(got.W, W)
    assert got.error == 0.0
    heads = obs.select_heads(W, inverse, kv_groups=3, heads_per_group=2, head_dim=2, keep_groups=3, keep_per_group=2)
    assert torch.equal(heads.W, W)


def test_dead_inputs_go_first_and_change_nothing() -> None:
    W, H, _ = problem(5, 12)
    H[[2, 9]] = 0
    H[:, [2, 9]] = 0
    inverse, dead, *_ = damped_inverse(H, 0.01)
    assert dead.nonzero().flatten().tolist() == [2, 9]
    W = W.masked_fill(dead, 0.0)
    got = obs.select_channels(W, inverse, keep=10, group_size_start=1, group_size_end=1)
    assert set(range(12)) - set(got.kept) == {2, 9}
    torch.testing.assert_close(got.W, W, rtol=0, atol=1e-12)
