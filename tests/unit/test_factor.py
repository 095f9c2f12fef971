"""The fit of the FFN's projections: against the ridge solution of all of its equations at once, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import tiny_model
from test_engine import calibration, config, loaded, logits, planned

from slimexport.pruning import factor
from slimexport.pruning.block import Block
from slimexport.pruning.factor import Matrices, Piece, fit_factors, linearised
from slimexport.pruning.forward import inputs_of
from slimexport.pruning.stage import prune_model

OUT, CHANNELS, IN, TOKENS = 4, 5, 3, 60
both = pytest.mark.parametrize("parts", [1, 2])


def problem(parts: int, seed: int = 0) -> tuple[torch.Tensor, list[Piece]]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def piece(n: int) -> Piece:
        return Piece(normal(n, IN), tuple(normal(n, CHANNELS) * (1 + k) for k in range(parts)), normal(n, OUT))

    return normal(OUT, CHANNELS), [piece(n) for n in (TOKENS // 4, 3 * TOKENS // 4)]


def held(D: torch.Tensor, pieces: list[Piece], ridge: float) -> list[float]:
    x = torch.cat([p.x for p in pieces])
    found = []
    for k in range(len(pieces[0].slopes)):
        slope = torch.cat([p.slopes[k] for p in pieces])
        each = D.square().sum(0) * slope.square().mean(0)  # ||D_j||^2 mean t_j^2
        found.append(ridge * float(each.mean()) * float(x.square().mean()))
    return found


def loss(V: Matrices, D: torch.Tensor, pieces: list[Piece], ridge: float) -> float:
    missing = 0.0
    for p in pieces:
        moved = sum((t * (p.x @ v.T)) @ D.T for t, v in zip(p.slopes, V, strict=True))
        missing += float((moved - p.missed).square().sum())
    ridges = held(D, pieces, ridge)
    return missing / TOKENS + sum(share * float(v.square().sum()) for share, v in zip(ridges, V, strict=True))


def solved(D: torch.Tensor, pieces: list[Piece], ridge: float) -> Matrices:
    """One equation for every token and output, one unknown for every entry of every V, and the ridges below them."""
    parts = len(pieces[0].slopes)
    rows, right = [], []
    for p in pieces:
        for i, x in enumerate(p.x):
            own = [((D * t[i]).unsqueeze(2) * x).flatten(1) for t in p.slopes]  # [out, channels * in] each
            rows.append(torch.cat(own, 1) / TOKENS**0.5)
            right.append(p.missed[i] / TOKENS**0.5)
    ridges = torch.tensor(held(D, pieces, ridge)).double().repeat_interleave(CHANNELS * IN)
    A = torch.cat([torch.cat(rows), ridges.sqrt().diag()])
    b = torch.cat([torch.cat(right), torch.zeros(len(ridges)).double()])
    solution = torch.linalg.lstsq(A, b.unsqueeze(1), driver="gelsd").solution
    return list(solution.view(parts, CHANNELS, IN))


@both
@pytest.mark.parametrize("ridge", [0.01, 0.1, 1.0])
def test_all_steps_give_the_ridge_solution(parts: int, ridge: float) -> None:
    D, pieces = problem(parts)
    found = fit_factors(D, pieces, [IN] * parts, ridge, steps=4 * parts * CHANNELS * IN, every=1)
    for got, wanted in zip(found, solved(D, pieces, ridge), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)


@both
@pytest.mark.parametrize("seed", range(5))
def test_every_step_lowers_the_error(parts: int, seed: int) -> None:
    D, pieces = problem(parts, seed)
    losses = [loss(fit_factors(D, pieces, [IN] * parts, 0.1, steps, every=1), D, pieces, 0.1) for steps in range(6)]
    assert losses == sorted(losses, reverse=True)
    if parts == 1:  # the preconditioner: three are nearly all
        assert losses[3] - losses[-1] < 0.1 * (losses[0] - losses[-1])


@both
def test_the_preconditioner_may_come_from_some_of_the_text(parts: int) -> None:
    D, pieces = problem(parts)
    ridge = held(D, pieces, 0.1)[0] / held(D, pieces[:1], 1.0)[0]  # the same one, in units of the first piece's
    found = fit_factors(D, pieces, [IN] * parts, ridge, steps=200, every=2)
    if parts == 1:
        torch.testing.assert_close(found[0], solved(D, pieces, 0.1)[0], rtol=1e-7, atol=1e-9)
    assert loss(found, D, pieces, 0.1) < loss([torch.zeros_like(v) for v in found], D, pieces, 0.1)


@both
def test_nothing_missed_changes_nothing(parts: int) -> None:
    D, pieces = problem(parts)
    none = [Piece(p.x, p.slopes, torch.zeros_like(p.missed)) for p in pieces]
    assert not any(bool(v.any()) for v in fit_factors(D, none, [IN] * parts))


@both
def test_projections_that_nothing_answers_to_stay(parts: int) -> None:
    D, pieces = problem(parts)
    shut = [Piece(p.x, tuple(torch.zeros_like(t) for t in p.slopes), p.missed) for p in pieces]
    assert not any(bool(v.any()) for v in fit_factors(D, shut, [IN] * parts))


def test_slopes_are_the_derivatives_of_the_product() -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 3, model.config.hidden_size)
    given, product, (by_up, by_gate) = linearised(
        lambda: inputs_of(mlp, "down_proj", x, {}), [mlp.up_proj, mlp.gate_proj]
    )
    assert torch.equal(given, x)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    torch.testing.assert_close(product, mlp.act_fn(gate) * up)
    torch.testing.assert_close(by_up, mlp.act_fn(gate))
    sigmoid = gate.sigmoid()
    torch.testing.assert_close(by_gate, sigmoid * (1 + gate * (1 - sigmoid)) * up)
    assert torch.equal(mlp.up_proj(x), torch.nn.functional.linear(x, mlp.up_proj.weight, mlp.up_proj.bias))
    assert not product.requires_grad


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_fit_brings_the_model_nearer_to_the_dense_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, text = tiny_model(family), calibration(sequences=48)
    plan = planned(dense, 0.4)
    target = logits(dense, text.input_ids).log_softmax(-1)

    def kl() -> float:
        small = prune_model(loaded(copy.deepcopy(dense)), plan, text, config(refit=0.1)).model
        return float((target.exp() * (target - logits(small, text.input_ids).log_softmax(-1))).sum(-1).mean())

    with_it = kl()
    monkeypatch.setattr(Block, "_fit_factors", lambda *_: None)
    assert with_it < kl()


def test_a_fit_that_raises_the_error_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, text = tiny_model("llama"), calibration(sequences=16)
    plan = planned(dense, 0.4)

    def pruned() -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
        made = prune_model(loaded(copy.deepcopy(dense)), plan, text, config(refit=0.1))
        return made.model.state_dict(), made.trace[0].notes

    def wild(D: torch.Tensor, pieces: list[Piece], inputs: list[int], **_: Any) -> Matrices:
        return [torch.full((D.shape[1], width), 10.0).double() for width in inputs]

    monkeypatch.setattr(factor, "fit_factors", wild)
    kept, notes = pruned()
    assert any("lowered the error" in note for note in notes)
    monkeypatch.setattr(Block, "_fit_factors", lambda *_: None)
    without, _ = pruned()
    for name in ("up_proj", "gate_proj"):
        name = f"model.layers.0.mlp.{name}.weight"
        assert torch.equal(kept[name], without[name])
