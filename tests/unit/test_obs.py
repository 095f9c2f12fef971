"""SlimGPT's mathematics against brute force in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from slimexport.pruning import obs


def problem(out: int, n: int, tokens: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W, correlated inputs' H (damped), and H^-1."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g, dtype=torch.float64)
    X = mix @ torch.randn(n, tokens, generator=g, dtype=torch.float64)
    H = X @ X.T / tokens
    inverse, _, used = obs.damped_inverse(H, 0.01)
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


def test_inverse_is_the_damped_inverse() -> None:
    _, H, inverse = problem(3, 12)
    torch.testing.assert_close(inverse @ H, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-9)


def test_damping_grows_until_cholesky_succeeds() -> None:
    v = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    H = torch.outer(v, v)
    H[0, 0] -= 0.02 * float(H.diagonal().mean())  # slightly indefinite: 0.01 is not enough
    inverse, dead, used = obs.damped_inverse(H, 1e-4)
    assert used > 1e-4
    assert torch.isfinite(inverse).all()
    assert not dead.any()


def test_hopeless_matrix_is_refused() -> None:
    with pytest.raises(obs.NotPositiveDefiniteError, match="not positive definite"):
        obs.damped_inverse(torch.tensor([[1.0, 1e9], [1e9, 1.0]]), 1e-8)


def test_score_of_every_group_of_columns_is_the_least_squares_error() -> None:
    W, H, inverse = problem(5, 12)
    state = obs.Eliminator(W, inverse)
    candidates = [list(c) for c in itertools.combinations(range(12), 3)]
    scores = state.scores(torch.tensor(candidates), chunk=50)
    expected = [least_squares(W, H, [j for j in range(12) if j not in c])[1] for c in candidates]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-10)


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
        plain = torch.zeros_like(W)
        plain[:, list(got.kept)] = W[:, list(got.kept)]
        compensated, uncompensated = obs.removal_errors(W, (got.W, plain), raw)
        assert compensated <= uncompensated + 1e-12


def test_removal_errors_are_those_of_the_outputs() -> None:
    g = torch.Generator().manual_seed(4)
    W, other, X = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((3, 5), (3, 5), (5, 40)))
    found = obs.removal_errors(W, (other, torch.zeros_like(W), W), X @ X.T / 40)
    direct = float(((other - W) @ X).square().sum() / (W @ X).square().sum())
    assert found == pytest.approx([direct, 1.0, 0.0], rel=1e-10)
    assert obs.removal_errors(torch.zeros_like(W), (other,), X @ X.T) == [0.0]
    bias = torch.randn(3, generator=g, dtype=torch.float64)
    found = obs.removal_errors(W, (other, other), X @ X.T / 40, X.mean(1), (None, bias))
    moved = float(((other - W) @ X + bias[:, None]).square().sum() / (W @ X).square().sum())
    assert found == pytest.approx([direct, moved], rel=1e-10)


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
    inverse, dead, _ = obs.damped_inverse(H, 0.01)
    assert dead.nonzero().flatten().tolist() == [2, 9]
    W = W.masked_fill(dead, 0.0)
    got = obs.select_channels(W, inverse, keep=10, group_size_start=1, group_size_end=1)
    assert set(range(12)) - set(got.kept) == {2, 9}
    torch.testing.assert_close(got.W, W, rtol=0, atol=1e-12)
