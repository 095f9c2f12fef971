"""Every criterion against its paper's formula in explicit loops over the raw inputs, every legal choice against
enumeration, and gradients against finite differences."""

from __future__ import annotations

import collections
import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from models import VOCAB, tiny_model

from slimexport.architectures import architecture_of
from slimexport.artifacts import BlockSizes
from slimexport.errors import BadInputError
from slimexport.pruning.criteria import Site, fasp, flap, magnitude, registry, taylor, wanda_sp
from slimexport.pruning.gradients import collect_gradients, collect_low_rank
from slimexport.pruning.legal import keep_channels, keep_heads
from slimexport.pruning.obs import Selection

OUT, HIDDEN, HEAD_DIM, TOKENS, CHANNELS = 5, 7, 2, 60, 11
# KV groups, query heads per group, and how many of both stay
STRUCTURES = [(3, 3, 2, 2), (4, 1, 2, 1), (1, 4, 1, 2), (2, 3, 2, 1), (3, 2, 1, 2), (3, 2, 2, 2), (2, 2, 1, 1)]
ADDITIVE = ["magnitude", "wanda_sp", "flap", "taylor", "fasp"]
CPU = torch.device("cpu")

structures = pytest.mark.parametrize("structure", STRUCTURES, ids=str)
seeds = pytest.mark.parametrize("seed", [0, 1, 2])


@dataclass(frozen=True)
class Problem:
    site: Site
    X: torch.Tensor  # [in, tokens]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int, structure: tuple[int, int, int, int] | None = None, damping: float = 0.01) -> Problem:
    """A heads problem of that structure, or a channels problem: correlated inputs of different sizes and means."""
    groups, per_group, keep_groups, keep_per_group = structure or (1, 1, 1, 1)
    dense, keep = BlockSizes(groups, per_group, CHANNELS), BlockSizes(keep_groups, keep_per_group, 6)
    query, key = dense.query_heads * HEAD_DIM, groups * HEAD_DIM
    if structure:
        name, n = "self_attn.o_proj.weight", query
        rows = {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key}
    else:
        name, n = "mlp.down_proj.weight", CHANNELS
        rows = {"mlp.gate_proj": CHANNELS, "mlp.up_proj": CHANNELS}
    spread = normal(n, 1, seed=seed + 100).exp()
    X = spread * (normal(n, n, seed=seed) @ normal(n, TOKENS, seed=seed + 200) + 3 * normal(n, 1, seed=seed + 300))
    sources, gradients = {}, {name: normal(OUT, n, seed=seed + 400)}
    for i, (source, count) in enumerate(rows.items()):
        for kind, shape in (("weight", (count, HIDDEN)), ("bias", (count,))):
            sources[f"{source}.{kind}"] = normal(*shape, seed=seed + 500 + i)
            gradients[f"{source}.{kind}"] = normal(*shape, seed=seed + 600 + i)
    site = Site(
        W=normal(OUT, n, seed=seed + 700), H=X @ X.T / TOKENS, mean=X.mean(1), dense=dense, keep=keep,
        head_dim=HEAD_DIM, group_size_start=4, group_size_end=1, damping=damping, name=name, block=2, seed=seed,
        sources=sources, gradients=gradients,
    )  # fmt: skip
    return Problem(site, X)


def legal_sets(dense: BlockSizes, keep: BlockSizes) -> Iterator[tuple[int, ...]]:
    for groups in itertools.combinations(range(dense.kv_groups), keep.kv_groups):
        members = [range(g * dense.heads_per_group, (g + 1) * dense.heads_per_group) for g in groups]
        for chosen in itertools.product(*(itertools.combinations(m, keep.heads_per_group) for m in members)):
            yield tuple(h for heads in chosen for h in heads)


def worth(heads: Sequence[int], dense: BlockSizes, scores: Sequence[float], groups: Sequence[float]) -> float:
    used = {h // dense.heads_per_group for h in heads}
    return sum(scores[h] for h in heads) + sum(groups[g] for g in used)


# ------------------------------------------------------------------------------------------- the papers, in slow motion


def slow_column_scores(criterion: str, p: Problem) -> list[float]:
    """What each column of W is worth by what can be said of it alone."""
    W, X = p.site.W.tolist(), p.X.tolist()
    scores = []
    for j in range(len(X)):
        column = [W[i][j] for i in range(OUT)]
        mean = sum(X[j]) / TOKENS
        if criterion == "magnitude":
            scores.append(sum(w * w for w in column))
        elif criterion in ("wanda_sp", "fasp"):
            scores.append(sum(abs(w) * math.sqrt(sum(x * x for x in X[j])) for w in column))
        elif criterion == "flap":
            scores.append(sum((x - mean) ** 2 for x in X[j]) / TOKENS * sum(w * w for w in column))
        elif criterion == "taylor":
            g = p.site.gradients[p.site.name].tolist()
            scores.append(sum(abs(column[i] * g[i][j]) for i in range(OUT)))
    return scores


def slow_row(p: Problem, source: str, row: int) -> float:
    """sum |w g| over a row of a source and its bias."""
    weight, gradient = (m[f"{source}.weight"][row].tolist() for m in (p.site.sources, p.site.gradients))
    bias, slope = (float(m[f"{source}.bias"][row]) for m in (p.site.sources, p.site.gradients))
    return sum(abs(w * g) for w, g in zip(weight, gradient, strict=True)) + abs(bias * slope)


def slow_head_scores(criterion: str, p: Problem) -> tuple[list[float], list[float]]:
    columns = slow_column_scores(criterion, p)
    rows = range(HEAD_DIM)
    heads = [sum(columns[h * HEAD_DIM + d] for d in rows) for h in range(p.site.dense.query_heads)]
    groups = [0.0] * p.site.dense.kv_groups
    if criterion == "taylor":
        for h in range(len(heads)):
            heads[h] += sum(slow_row(p, "self_attn.q_proj", h * HEAD_DIM + d) for d in rows)
        for g, source in itertools.product(range(len(groups)), ("self_attn.k_proj", "self_attn.v_proj")):
            groups[g] += sum(slow_row(p, source, g * HEAD_DIM + d) for d in rows)
    return heads, groups


def slow_channel_scores(criterion: str, p: Problem) -> list[float]:
    scores = slow_column_scores(criterion, p)
    if criterion == "taylor":
        for j, source in itertools.product(range(CHANNELS), ("mlp.gate_proj", "mlp.up_proj")):
            scores[j] += slow_row(p, source, j)
    return scores


def slow_error(p: Problem, W: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    """Mean over the tokens of ||W' x (+ bias) - W x||^2."""
    total = 0.0
    for t in range(TOKENS):
        off = W @ p.X[:, t] - p.site.W @ p.X[:, t]
        total += float((off if bias is None else off + bias).square().sum())
    return total / TOKENS


def head_columns(heads: Sequence[int]) -> list[int]:
    return [h * HEAD_DIM + d for h in heads for d in range(HEAD_DIM)]


def check_removed(p: Problem, got: Selection, columns: list[int], compensated: bool) -> None:
    gone = [j for j in range(p.site.W.shape[1]) if j not in columns]
    assert gone
    assert not got.W[:, gone].any()
    assert torch.equal(got.W[:, columns], p.site.W[:, columns]) != compensated
    assert got.error == pytest.approx(slow_error(p, got.W), rel=1e-9)


@pytest.mark.parametrize("criterion", ADDITIVE)
@structures
@seeds
def test_heads_are_the_best_legal_set_by_the_papers_scores(criterion: str, structure: Any, seed: int) -> None:
    p = problem(seed, structure)
    scores, groups = slow_head_scores(criterion, p)
    legal = list(legal_sets(p.site.dense, p.site.keep))
    best = max(legal, key=lambda heads: worth(heads, p.site.dense, scores, groups))
    got, _ = registry.get(criterion).heads(p.site)
    assert got.kept == best
    check_removed(p, got, head_columns(best), compensated=criterion == "fasp")
    assert (got.bias is not None) == (criterion == "flap")


@pytest.mark.parametrize("criterion", ADDITIVE)
@seeds
def test_channels_are_the_best_by_the_papers_scores(criterion: str, seed: int) -> None:
    p = problem(seed)
    scores = slow_channel_scores(criterion, p)
    best = sorted(sorted(range(CHANNELS), key=scores.__getitem__)[-p.site.keep.channels :])
    got, _ = registry.get(criterion).channels(p.site)
    assert list(got.kept) == best
    check_removed(p, got, best, compensated=criterion == "fasp")
    assert (got.bias is not None) == (criterion == "flap")


@seeds
def test_scores_are_the_papers(seed: int) -> None:
    p, attention = problem(seed), problem(seed, (3, 2, 2, 1))

    def same(ours: torch.Tensor, theirs: list[float]) -> None:
        torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-9, atol=1e-12)

    same(wanda_sp.column_scores(p.site) * math.sqrt(TOKENS), slow_column_scores("wanda_sp", p))
    same(flap.column_scores(p.site), slow_column_scores("flap", p))
    same(taylor.channel_scores(p.site), slow_channel_scores("taylor", p))
    heads, groups = taylor.head_scores(attention.site)
    same(heads, slow_head_scores("taylor", attention)[0])
    same(groups, slow_head_scores("taylor", attention)[1])


def test_the_problems_tell_the_criteria_apart() -> None:
    """If two criteria agreed on all of them, the tests above could not see one passed off as the other."""
    choices = collections.defaultdict(list)
    for criterion, seed in itertools.product(["slimgpt", "random", *ADDITIVE], range(3)):
        choices[criterion].append(registry.get(criterion).channels(problem(seed).site)[0].kept)
        choices[criterion] += [registry.get(criterion).heads(problem(seed, s).site)[0].kept for s in STRUCTURES]
    for one, other in itertools.combinations(choices, 2):
        assert (choices[one] == choices[other]) == ({one, other} == {"wanda_sp", "fasp"})


# ---------------------------------------------------------------------------------------------------------- legality


@structures
@pytest.mark.parametrize("with_groups", [False, True])
def test_keep_heads_is_the_optimum(structure: Any, with_groups: bool) -> None:
    groups, per_group, keep_groups, keep_per_group = structure
    dense, keep = BlockSizes(groups, per_group, 1), BlockSizes(keep_groups, keep_per_group, 1)
    legal = set(legal_sets(dense, keep))
    for seed in range(40):
        scores = normal(dense.query_heads, seed=seed)  # of both signs
        extra = 2 * normal(groups, seed=seed + 1000) if with_groups else torch.zeros(groups, dtype=torch.float64)
        if seed % 2:  # with ties, in exact arithmetic
            scores, extra = scores.round(), extra.round()
        kept = keep_heads(scores, dense, keep, extra if with_groups else None)
        assert kept in legal
        best = max(worth(heads, dense, scores.tolist(), extra.tolist()) for heads in legal)
        assert worth(kept, dense, scores.tolist(), extra.tolist()) == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_of_equals_the_lower_index_goes_first() -> None:
    assert keep_channels(torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0]), 3) == (0, 3, 4)
    assert keep_heads(torch.zeros(6), BlockSizes(3, 2, 1), BlockSizes(2, 1, 1)) == (3, 5)
    assert keep_heads(torch.zeros(6), BlockSizes(3, 2, 1), BlockSizes(3, 2, 1)) == (0, 1, 2, 3, 4, 5)
    assert keep_channels(torch.zeros(3), 3) == (0, 1, 2)


def test_a_group_can_be_kept_for_its_keys_and_values() -> None:
    scores, dense, keep = torch.tensor([1.0, 1.0, 2.0, 2.0]), BlockSizes(2, 2, 1), BlockSizes(1, 2, 1)
    assert keep_heads(scores, dense, keep) == (2, 3)
    assert keep_heads(scores, dense, keep, torch.tensor([3.0, 0.0])) == (0, 1)


# -------------------------------------------------------------------------------------------------------------- FLAP


@pytest.mark.parametrize("structure", [None, *STRUCTURES], ids=str)
@seeds
def test_flap_bias_is_the_mean_output_of_what_went_and_lowers_the_error(structure: Any, seed: int) -> None:
    p = problem(seed, structure)
    got, damping = registry.get("flap").heads(p.site) if structure else registry.get("flap").channels(p.site)
    columns = head_columns(got.kept) if structure else list(got.kept)
    gone = [j for j in range(len(p.X)) if j not in columns]
    mean_output = sum(p.site.W[:, gone] @ p.X[gone, t] for t in range(TOKENS)) / TOKENS
    assert got.bias is not None
    torch.testing.assert_close(got.bias, mean_output, rtol=1e-9, atol=1e-12)
    assert damping == 0.0
    plain, with_bias = slow_error(p, got.W), slow_error(p, got.W, got.bias)
    assert with_bias < plain
    assert with_bias == pytest.approx(got.error - float(got.bias.square().sum()), rel=1e-8, abs=1e-10)


def test_flap_lets_a_large_constant_input_go_for_nothing() -> None:
    p = problem(0)
    X = p.X.clone()
    X[4] = 50.0
    # As float32 products leave it: the variance of a constant comes out below zero.
    H = X @ X.T / TOKENS
    H[4, 4] *= 1 - 1e-7
    site = replace(p.site, H=H, mean=X.mean(1), keep=BlockSizes(1, 1, CHANNELS - 1))
    got, _ = registry.get("flap").channels(site)
    assert flap.column_scores(site)[4] == 0
    assert 4 not in got.kept
    assert 4 in registry.get("wanda_sp").channels(site)[0].kept
    assert slow_error(Problem(site, X), got.W, got.bias) == pytest.approx(0, abs=1e-18)


# -------------------------------------------------------------------------------------------------------------- FASP


@pytest.mark.parametrize("structure", [None, *STRUCTURES], ids=str)
@pytest.mark.parametrize("damping", [1e-13, 0.01])
def test_fasp_restores_by_least_squares(structure: Any, damping: float) -> None:
    p = problem(1, structure, damping)
    got, used = registry.get("fasp").heads(p.site) if structure else registry.get("fasp").channels(p.site)
    plain, _ = registry.get("wanda_sp").heads(p.site) if structure else registry.get("wanda_sp").channels(p.site)
    columns = head_columns(got.kept) if structure else list(got.kept)
    assert used == damping
    assert got.kept == plain.kept
    # ||W' X_S - W X||^2 / tokens + delta ||W'||^2 as one least-squares problem in the raw inputs
    delta = damping * float(p.X[columns].square().sum()) / TOKENS / len(columns)
    design = torch.cat([p.X[columns].T / math.sqrt(TOKENS), math.sqrt(delta) * torch.eye(len(columns))])
    target = torch.cat([(p.site.W @ p.X).T / math.sqrt(TOKENS), torch.zeros(len(columns), OUT)])
    expected = torch.linalg.lstsq(design, target, driver="gelsd").solution.T
    torch.testing.assert_close(got.W[:, columns], expected, rtol=1e-6, atol=1e-8)
    if damping < 1e-6:
        fitted = torch.linalg.lstsq(p.X[columns].T, (p.site.W @ p.X).T, driver="gelsd").solution.T
        torch.testing.assert_close(got.W[:, columns], fitted, rtol=1e-5, atol=1e-7)
        assert got.error < plain.error


def test_fasp_with_inputs_that_never_fired() -> None:
    p = problem(3)
    X = p.X.clone()
    X[[2, 7]] = 0
    site = replace(p.site, H=X @ X.T / TOKENS, mean=X.mean(1), keep=BlockSizes(1, 1, CHANNELS - 1), damping=1e-12)
    got, _ = registry.get("fasp").channels(site)
    assert 2 not in got.kept
    assert 7 in got.kept
    assert not got.W[:, 7].any()
    alive = [j for j in range(CHANNELS) if j not in (2, 7)]
    torch.testing.assert_close(got.W[:, alive], p.site.W[:, alive], rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------ Taylor


def test_taylor_refuses_a_source_that_is_neither_heads_nor_groups() -> None:
    site = problem(0, (3, 2, 2, 1)).site
    odd = {**site.sources, "self_attn.x.weight": torch.ones(4 * HEAD_DIM, HIDDEN, dtype=torch.float64)}
    slopes = {**site.gradients, "self_attn.x.weight": odd["self_attn.x.weight"]}
    with pytest.raises(ValueError, match=r"self_attn\.x\.weight has 8 rows"):
        registry.get("taylor").heads(replace(site, sources=odd, gradients=slopes))


def test_what_each_criterion_asks_for() -> None:
    names = registry.names()
    assert {*ADDITIVE, "random", "slimgpt"} <= set(names)
    assert [n for n in names if getattr(registry.get(n), "needs_gradients", False)] == ["taylor", "taylor_lora"]
    assert [n for n in names if getattr(registry.get(n), "compensates_bias", False)] == ["flap"]


def test_no_criterion_writes_into_its_site() -> None:
    for criterion, structure in itertools.product([*ADDITIVE, "random"], [None, (3, 2, 2, 1)]):
        site = problem(0, structure).site
        before = copy.deepcopy(site)
        getattr(registry.get(criterion), "heads" if structure else "channels")(site)
        for name in ("W", "H", "mean"):
            assert torch.equal(getattr(site, name), getattr(before, name))
        for name in ("sources", "gradients"):
            assert all(torch.equal(t, getattr(before, name)[n]) for n, t in getattr(site, name).items())


# ------------------------------------------------------------------------------------------------------------ random


def test_random_follows_seed_block_and_kind_alone() -> None:
    one = problem(0, (3, 3, 2, 2)).site

    def drawn(**changes: Any) -> list[tuple[int, ...]]:
        return [registry.get("random").heads(replace(one, **{"seed": s, **changes}))[0].kept for s in range(12)]

    other_weights = problem(5, (3, 3, 2, 2)).site
    torch.manual_seed(123)
    assert drawn() == drawn(W=other_weights.W, H=other_weights.H, mean=other_weights.mean)
    assert len(set(drawn())) > 6
    assert drawn() != drawn(block=3)
    channels = registry.get("random").channels(replace(one, W=problem(0).site.W, H=problem(0).site.H))[0].kept
    as_many_heads = replace(one, dense=BlockSizes(CHANNELS, 1, CHANNELS), keep=BlockSizes(6, 1, 6), head_dim=1)
    heads = registry.get("random").heads(replace(as_many_heads, W=problem(0).site.W, H=problem(0).site.H))[0].kept
    assert len(heads) == len(channels)
    assert heads != channels


@pytest.mark.parametrize("structure", [(3, 3, 2, 1), (2, 2, 1, 2)], ids=str)  # the second: sums of ranks would tie
def test_random_draws_every_legal_set_equally_often(structure: Any) -> None:
    site = problem(0, structure).site
    legal = list(legal_sets(site.dense, site.keep))
    draws = 100 * len(legal)
    counts = collections.Counter(registry.get("random").heads(replace(site, seed=s))[0].kept for s in range(draws))
    assert set(counts) == set(legal)
    chi_square = sum((counts[heads] - 100) ** 2 / 100 for heads in legal)
    freedom = len(legal) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_magnitude_needs_no_data() -> None:
    p = problem(0)
    blind = replace(p.site, H=torch.eye(CHANNELS, dtype=torch.float64), mean=torch.zeros(CHANNELS))
    assert magnitude.Magnitude().channels(p.site)[0].kept == magnitude.Magnitude().channels(blind)[0].kept
    assert fasp.Fasp().channels(p.site)[0].kept != fasp.Fasp().channels(blind)[0].kept


# --------------------------------------------------------------------------------------------------------- gradients


def tokens(sequences: int = 3, length: int = 9, seed: int = 4) -> torch.Tensor:
    return torch.randint(VOCAB, (sequences, length), generator=torch.Generator().manual_seed(seed))


def mean_nll(model: Any, ids: torch.Tensor) -> float:
    """Token by token, from the log-probabilities."""
    with torch.no_grad():
        logs = model(ids, use_cache=False).logits.double().log_softmax(-1)
    nll = [-float(logs[s, t, ids[s, t + 1]]) for s in range(len(ids)) for t in range(ids.shape[1] - 1)]
    return sum(nll) / len(nll)


def gradients_of(model: Any, ids: torch.Tensor, **options: Any) -> list[dict[str, torch.Tensor]]:
    return collect_gradients(model, architecture_of(model.config, "tiny"), ids, device=CPU, **options)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradients_are_the_slopes_of_the_loss(family: str) -> None:
    model, ids = tiny_model(family, dtype=torch.float64), tokens()
    got = gradients_of(model, ids)
    assert len(got) == 3
    for block, found in zip(model.model.layers, got, strict=True):
        assert found.keys() == dict(block.named_parameters()).keys()
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32
            weight = block.get_parameter(name)
            assert gradient.shape == weight.shape
            # Along the gradient, where the slope is its norm (0.02 to 4), and along anything else. The norms inside the
            # model compute in float32 whatever they are given: that is where the tolerance comes from.
            for direction in (gradient.double(), normal(*weight.shape, seed=len(name))):
                step = direction / direction.norm() * 1e-3
                kept = weight.data.clone()
                weight.data = kept + step
                above = mean_nll(model, ids)
                weight.data = kept - step
                below = mean_nll(model, ids)
                weight.data = kept
                slope = (above - below) / 2e-3
                expected = float((gradient.double() * direction).sum() / direction.norm())
                assert slope == pytest.approx(expected, rel=0, abs=3e-4)


def reference(model: Any, ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """All sequences at once, by transformers' own loss."""
    model = copy.deepcopy(model).requires_grad_(True)
    model(ids, labels=ids, use_cache=False).loss.backward()
    return [{n: p.grad.float() for n, p in block.named_parameters()} for block in model.model.layers]


def assert_same(got: Any, expected: Any, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_gradients_equal_those_of_the_whole_batch(family: str) -> None:
    model, ids = tiny_model(family), tokens()
    assert_same(gradients_of(model, ids), reference(model, ids))


def low_rank_of(model: Any, ids: torch.Tensor, rank: int) -> list[dict[str, torch.Tensor]]:
    architecture = architecture_of(model.config, "tiny")
    return [dict(block) for block in collect_low_rank(model, architecture, ids, rank=rank, device=CPU)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi3"])
def test_adapters_of_full_rank_have_the_whole_gradient(family: str) -> None:
    model, ids = tiny_model(family, dtype=torch.float64), tokens()
    assert_same(low_rank_of(model, ids, rank=1000), gradients_of(model, ids), rtol=1e-3, atol=1e-6)


def test_adapters_of_low_rank_have_most_of_the_gradient() -> None:
    model, ids = tiny_model(dtype=torch.float64), tokens()
    rank = 4
    seen = []
    for whole, found in zip(gradients_of(model, ids), low_rank_of(model, ids, rank), strict=True):
        assert whole.keys() == found.keys()
        for name, gradient in whole.items():
            if gradient.dim() < 2:
                torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
                continue
            exact, own = gradient.double(), found[name].double()
            assert torch.linalg.matrix_rank(own, rtol=1e-4) <= rank
            # It is a projection of the gradient, so that what it leaves is at a right angle to it, ...
            left = exact - own
            assert float((own * left).sum()) == pytest.approx(0, abs=1e-4 * float(exact.square().sum()))
            # ... and no less than what the best matrix of that rank would leave.
            values = torch.linalg.svdvals(exact).square()
            assert float(left.square().sum()) >= float(values[rank:].sum()) * (1 - 1e-3)
            # Halko et al., theorem 10.5: what it leaves on average, at most.
            most = min(float(values[k:].sum()) * (1 + k / (rank - k - 1)) for k in range(rank - 1))
            seen.append(float(left.square().sum()) / most)
    assert sum(seen) / len(seen) < 1


def test_adapters_leave_nothing_behind() -> None:
    model, ids = tiny_model(), tokens()
    with torch.no_grad():
        before = model(ids).logits
        low_rank_of(model, ids, rank=2)
        assert torch.equal(model(ids).logits, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_experts_in_one_tensor_have_their_whole_gradient() -> None:
    model, ids = tiny_model("qwen3_moe"), tokens()
    name = "mlp.experts.down_proj"
    for whole, found in zip(gradients_of(model, ids), low_rank_of(model, ids, rank=2), strict=True):
        assert whole.keys() == found.keys()
        torch.testing.assert_close(found[name], whole[name], rtol=1e-4, atol=1e-6)


def test_only_the_first_sequences_count() -> None:
    model, ids = tiny_model(), tokens(5)
    assert_same(gradients_of(model, ids, max_sequences=2), reference(model, ids[:2]))


def test_the_precision_of_the_computation_can_be_chosen() -> None:
    stored = tiny_model(dtype=torch.bfloat16)
    ids = tokens()
    assert_same(gradients_of(stored, ids, dtype=torch.float32), reference(copy.deepcopy(stored).float(), ids))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_where_the_caller_has_switched_them_off(mode: Any) -> None:
    model, ids = tiny_model(), tokens()
    with mode():
        got = gradients_of(model, ids)
    assert_same(got, reference(model, ids))


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_the_model_is_left_as_it_was(dtype: torch.dtype | None) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    parameters = dict(model.named_parameters())
    for i, parameter in enumerate(parameters.values()):
        parameter.requires_grad_(i % 2 == 0)
        parameter.grad = torch.full_like(parameter, 0.5) if i % 3 == 0 else None
    bits = {n: t.clone() for n, t in model.state_dict().items()}
    flags = {n: (p.requires_grad, p.grad, p.data_ptr()) for n, p in parameters.items()}
    model.train()
    gradients_of(model, tokens(), dtype=dtype)
    assert not any(m.training for m in model.modules())
    after = dict(model.named_parameters())
    assert all(after[n] is p for n, p in parameters.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, (requires_grad, grad, address) in flags.items():
        assert after[name].requires_grad == requires_grad
        assert after[name].grad is grad
        assert grad is None or bool((grad == 0.5).all())
        assert after[name].data_ptr() == address
    assert all(torch.equal(t, bits[n]) for n, t in model.state_dict().items())


def test_weights_without_gradients_are_refused() -> None:
    model = tiny_model()
    weight = model.model.layers[1].mlp.up_proj
    weight.weight = torch.nn.Parameter(weight.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(BadInputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is stored as int8"):
        gradients_of(model, tokens())
    with torch.inference_mode():
        model = tiny_model()
    with pytest.raises(BadInputError, match=r"made under torch\.inference_mode\(\)"):
        gradients_of(model, tokens())


@pytest.mark.parametrize("shape", [(0, 9), (3, 1)])
def test_nothing_to_predict_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(BadInputError, match="at least two tokens"):
        gradients_of(tiny_model(), tokens(*shape))


def test_an_overflow_is_refused() -> None:
    model = tiny_model()
    model.model.layers[2].mlp.down_proj.weight.data[3, 5] = math.inf
    with pytest.raises(BadInputError, match="overflows in float32: a weight or a scale of the model is too large"):
        gradients_of(model, tokens())
