"""The re-fit toward the dense stream: against least squares on stacked equations, and in the engine against running
whole models."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from models import tiny_model
from test_engine import calibration, config, loaded, logits, planned

from slimexport.architectures import architecture_of
from slimexport.pruning import obs
from slimexport.pruning.block import Block
from slimexport.pruning.blocks import kept_of
from slimexport.pruning.criteria import Site
from slimexport.pruning.criteria import registry as criteria
from slimexport.pruning.inverse import damped_inverse
from slimexport.pruning.readout import held_out
from slimexport.pruning.stage import prune_model


class Problem:
    """W [out, n], correlated X [n, tokens], targets Y [out, tokens] that are near W X, and the moments of both."""

    def __init__(self, seed: int, out: int = 5, n: int = 12, tokens: int = 90):
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.W, self.X = normal(out, n), normal(n, n) @ normal(n, tokens)
        self.Y = (self.W + 0.5 * normal(out, n)) @ self.X + normal(out, tokens)
        self.tokens = tokens
        self.H, self.C = self.X @ self.X.T / tokens, self.Y @ self.X.T / tokens

    def ridge(self, share: float) -> float:
        return share * float(self.H.diagonal().mean())

    def stacked(self, share: float, kept: list[int] | None = None) -> torch.Tensor:
        """argmin_V ||V_S X_S - Y||^2 / tokens + l ||V_S - W_S||^2, zero outside S, by lstsq on the stacked rows."""
        kept = list(range(self.W.shape[1])) if kept is None else kept
        root = self.ridge(share) ** 0.5
        rows = torch.cat([self.X[kept].T / self.tokens**0.5, root * torch.eye(len(kept), dtype=torch.float64)])
        targets = torch.cat([self.Y.T / self.tokens**0.5, root * self.W[:, kept].T])
        V = torch.zeros_like(self.W)
        V[:, kept] = torch.linalg.lstsq(rows, targets, driver="gelsd").solution.T
        return V

    def loss(self, V: torch.Tensor, share: float = 0.0, kept: list[int] | None = None) -> float:
        """`kept`: the ridge holds these columns only."""
        D = V - self.W if kept is None else (V - self.W)[:, kept]
        fit = (V @ self.X - self.Y).square().sum() / self.tokens
        return float(fit + self.ridge(share) * D.square().sum())

    def fitted_and_pruned(self, share: float, damping: float, keep: int = 7) -> tuple[torch.Tensor, obs.Selection]:
        V = obs.refit(self.W, self.H, self.C - self.W @ self.H, share)
        inverse, *_ = damped_inverse(self.H, damping)
        return V, obs.select_channels(V, inverse, keep=keep, group_size_start=2, group_size_end=1)


seeds = pytest.mark.parametrize("seed", range(4))


@seeds
@pytest.mark.parametrize("share", [1e-6, 0.01, 1.0, 30.0])
def test_refit_is_the_stacked_least_squares_solution(seed: int, share: float) -> None:
    p = Problem(seed)
    V = obs.refit(p.W, p.H, p.C - p.W @ p.H, share)
    torch.testing.assert_close(V, p.stacked(share), rtol=1e-7, atol=1e-8)


@seeds
def test_an_infinite_ridge_gives_w_and_none_gives_plain_least_squares(seed: int) -> None:
    p = Problem(seed)
    torch.testing.assert_close(obs.refit(p.W, p.H, p.C - p.W @ p.H, 1e12), p.W, rtol=0, atol=1e-10)
    plain = torch.linalg.lstsq(p.X.T, p.Y.T, driver="gelsd").solution.T
    torch.testing.assert_close(obs.refit(p.W, p.H, p.C - p.W @ p.H, 1e-12), plain, rtol=1e-6, atol=1e-7)


def test_inputs_that_never_fired_keep_their_columns() -> None:
    p = Problem(1)
    p.X[[2, 5]] = 0
    V = obs.refit(p.W, p.X @ p.X.T / p.tokens, (p.Y - p.W @ p.X) @ p.X.T / p.tokens, 0.1)
    torch.testing.assert_close(V[:, [2, 5]], p.W[:, [2, 5]], rtol=0, atol=1e-12)
    assert torch.equal(obs.refit(p.W, torch.zeros_like(p.H), torch.zeros_like(p.C), 1.0), p.W)


@seeds
@pytest.mark.parametrize("share", [0.01, 1.0])
def test_refit_then_removal_is_the_ridge_solution_on_the_kept_columns(seed: int, share: float) -> None:
    """Exactly so where the damping of H is the ridge: V (H + l) = C + l W, so that the kept columns solve
    V_S (H_SS + l) = C_S + l W_S, the normal equations of the fit to Y with the ridge toward W_S."""
    p = Problem(seed)
    _, got = p.fitted_and_pruned(share, damping=share)
    torch.testing.assert_close(got.W, p.stacked(share, list(got.kept)), rtol=1e-7, atol=1e-8)


@seeds
def test_without_ridge_and_damping_it_is_plain_least_squares_to_the_targets(seed: int) -> None:
    p = Problem(seed)
    _, got = p.fitted_and_pruned(1e-11, damping=1e-11)
    kept = list(got.kept)
    plain = torch.linalg.lstsq(p.X[kept].T, p.Y.T, driver="gelsd").solution.T
    torch.testing.assert_close(got.W[:, kept], plain, rtol=1e-5, atol=1e-6)


@seeds
@pytest.mark.parametrize("share", [0.01, 1.0])
def test_with_little_damping_the_kept_columns_fit_the_refitted_matrix(seed: int, share: float) -> None:
    """Where damping and ridge differ, what is fitted on the kept columns is V X, the ridge's compromise, not Y."""
    p = Problem(seed)
    V, got = p.fitted_and_pruned(share, damping=1e-11)
    kept = list(got.kept)
    best = torch.linalg.lstsq(p.X[kept].T, (V @ p.X).T, driver="gelsd").solution.T
    torch.testing.assert_close(got.W[:, kept], best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_compensation_never_loses_to_plain_removal(seed: int) -> None:
    p = Problem(seed)
    for share in (0.01, 1.0):
        V, got = p.fitted_and_pruned(share, damping=share)
        kept = list(got.kept)
        for plain in (V, p.W):
            masked = torch.zeros_like(plain)
            masked[:, kept] = plain[:, kept]
            assert p.loss(got.W, share, kept) <= p.loss(masked, share, kept) + 1e-9
    V, got = p.fitted_and_pruned(1e-11, damping=1e-11)
    masked = torch.zeros_like(V)
    masked[:, list(got.kept)] = V[:, list(got.kept)]
    assert p.loss(got.W) <= p.loss(masked) + 1e-7
    assert p.loss(V) <= p.loss(p.W) + 1e-9


# ---------------------------------------------------------------------------------------------------- in the engine


def slow_refit(model: Any, plan: Any, ids: torch.Tensor, ridge: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two whole models from the embedding for every matrix: the masked one gives X, and what the residual stream
    lacks after it, compared with the dense one, is what W is fitted to beside its own output."""
    dense, architecture = copy.deepcopy(model), architecture_of(model.config, "tiny")
    results = []
    for index, block in enumerate(model.model.layers):
        done = []
        for name, where in (("self_attn.o_proj", "post_attention_layernorm"), ("mlp.down_proj", None)):
            seen: dict[str, torch.Tensor] = {}

            def residual(of: Any, key: str, where: str | None = where, index: int = index, seen: Any = seen) -> Any:
                """Notes the residual stream after the matrix: what the second norm reads, or what the block gives."""
                layer = of.model.layers[index]
                if where:
                    return layer.get_submodule(where).register_forward_pre_hook(
                        lambda _m, args: seen.__setitem__(key, args[0])
                    )
                return layer.register_forward_hook(lambda _m, _a, out: seen.__setitem__(key, out))

            module = block.get_submodule(name)
            handles = [
                module.register_forward_pre_hook(lambda _m, args, seen=seen: seen.__setitem__("X", args[0])),
                residual(model, "masked"), residual(dense, "dense"),
            ]  # fmt: skip
            logits(model, ids)
            logits(dense, ids)
            for handle in handles:
                handle.remove()
            X = seen["X"].reshape(-1, seen["X"].shape[-1]).double()
            W = module.weight.double()
            Y = X @ W.T + (seen["dense"] - seen["masked"]).reshape(len(X), -1).double()
            H = X.T @ X / len(X)
            V = obs.refit(W, H, (Y.T - W @ X.T) @ X / len(X), ridge)
            site = Site(V, H, X.mean(0), plan.dense[index], plan.blocks[index], architecture.head_dim, 8, 1, 0.01)
            criterion = criteria.get(plan.criterion)
            kept, dense_sizes = plan.blocks[index], plan.dense[index]
            if "o_proj" in name:
                same = (kept.kv_groups, kept.heads_per_group) == (dense_sizes.kv_groups, dense_sizes.heads_per_group)
                changed = V if same else criterion.heads(site)[0].W
            else:
                changed = V if kept.channels == dense_sizes.channels else criterion.channels(site)[0].W
            module.weight.data = changed.to(module.weight.dtype)
            done.append(changed)
        results.append((done[0], done[1]))
    return results


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # with biases on both output matrices, and without
def test_engine_equals_whole_models_run_side_by_side(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "_fit_factors", lambda *_: None)  # they have tests of their own
    dense = tiny_model(family)
    plan, text = planned(dense, 0.4), calibration()
    small = prune_model(loaded(copy.deepcopy(dense)), plan, text, config(refit=0.5, curvature_tokens=0))
    aside = held_out(*text.input_ids.shape)
    used = torch.stack([ids for i, ids in enumerate(text.input_ids) if i not in aside])
    expected = slow_refit(copy.deepcopy(dense), plan, used, 0.5)
    architecture = architecture_of(dense.config, "tiny")
    for trace, block, (heads, channels) in zip(small.trace, small.model.model.layers, expected, strict=True):
        kept = kept_of(trace, plan.dense[trace.block])
        columns = architecture.axis_index("query", kept)
        torch.testing.assert_close(block.self_attn.o_proj.weight.double(), heads[:, columns], rtol=1e-3, atol=2e-4)
        down = block.mlp.down_proj.weight.double()
        torch.testing.assert_close(down, channels[:, list(kept.channels)], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_before_anything_is_pruned_nothing_is_changed(family: str) -> None:
    dense = tiny_model(family)
    plan = planned(dense, 0.0)
    last = dataclasses.replace(plan.blocks[-1], channels=40)
    plan = dataclasses.replace(plan, blocks=(*plan.blocks[:-1], last))
    small = prune_model(loaded(copy.deepcopy(dense)), plan, calibration(), config(refit=1.0))
    for index in (0, 1):
        ours, theirs = small.model.model.layers[index], dense.model.layers[index]
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            torch.testing.assert_close(
                ours.get_parameter(f"{name}.weight"), theirs.get_parameter(f"{name}.weight"), rtol=0, atol=1e-5
            )


def test_the_refit_brings_the_model_nearer_to_the_dense_one() -> None:
    dense, text = tiny_model("llama"), calibration(sequences=48)
    plan = planned(dense, 0.3)
    target = logits(dense, text.input_ids).log_softmax(-1)

    def kl(refit: float) -> float:
        small = prune_model(loaded(copy.deepcopy(dense)), plan, text, config(refit=refit)).model
        return float((target.exp() * (target - logits(small, text.input_ids).log_softmax(-1))).sum(-1).mean())

    assert kl(0.1) < kl(0.0)
