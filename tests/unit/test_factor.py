"""The fit of the gated FFN's factor: against the ridge solution of all of its equations at once, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny_model
from test_engine import calibration, config, loaded, logits, planned

from slimexport.pruning import factor
from slimexport.pruning.block import Block
from slimexport.pruning.factor import Piece, fit_factor
from slimexport.pruning.forward import inputs_of
from slimexport.pruning.stage import prune_model

OUT, CHANNELS, IN, TOKENS = 4, 5, 3, 40


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[Piece]]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    pieces = [Piece(normal(n, IN), normal(n, CHANNELS), normal(n, OUT)) for n in (TOKENS // 4, 3 * TOKENS // 4)]
    return normal(CHANNELS, IN), normal(OUT, CHANNELS), pieces


def held(D: torch.Tensor, pieces: list[Piece], ridge: float) -> float:
    x, gate = (torch.cat([getattr(p, name) for p in pieces]) for name in ("x", "gate"))
    each = D.square().sum(0) * gate.square().mean(0)  # ||D_j||^2 mean s_j^2
    return ridge * float(each.mean()) * float(x.square().mean())


def loss(V: torch.Tensor, D: torch.Tensor, pieces: list[Piece], ridge: float) -> float:
    missing = sum(float(((p.gate * (p.x @ V.T)) @ D.T - p.missed).square().sum()) for p in pieces)
    return missing / TOKENS + held(D, pieces, ridge) * float(V.square().sum())


def solved(D: torch.Tensor, pieces: list[Piece], ridge: float) -> torch.Tensor:
    """One equation for every token and output, one unknown for every entry of V, and the ridge below them."""
    rows, right = [], []
    for p in pieces:
        for x, s, missed in zip(p.x, p.gate, p.missed, strict=True):
            rows.append((D * s).unsqueeze(2) * x / TOKENS**0.5)  # [out, channels, in]
            right.append(missed / TOKENS**0.5)
    A = torch.cat([torch.cat(rows).flatten(1), held(D, pieces, ridge) ** 0.5 * torch.eye(CHANNELS * IN).double()])
    b = torch.cat([torch.cat(right), torch.zeros(CHANNELS * IN).double()])
    return torch.linalg.lstsq(A, b.unsqueeze(1), driver="gelsd").solution.view(CHANNELS, IN)


@pytest.mark.parametrize("ridge", [0.01, 0.1, 1.0])
def test_all_steps_give_the_ridge_solution(ridge: float) -> None:
    U, D, pieces = problem()
    found = fit_factor(U, D, pieces, ridge, steps=2 * CHANNELS * IN)
    torch.testing.assert_close(found - U, solved(D, pieces, ridge), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_every_step_lowers_the_error(seed: int) -> None:
    U, D, pieces = problem(seed)
    losses = [loss(fit_factor(U, D, pieces, 0.1, steps) - U, D, pieces, 0.1) for steps in range(6)]
    assert losses == sorted(losses, reverse=True)
    assert losses[3] - losses[-1] < 0.1 * (losses[0] - losses[-1])  # the preconditioner: three are nearly all


def test_nothing_missed_changes_nothing() -> None:
    U, D, pieces = problem()
    none = [Piece(p.x, p.gate, torch.zeros_like(p.missed)) for p in pieces]
    assert torch.equal(fit_factor(U, D, none), U)


def test_a_gate_that_never_opens_changes_nothing() -> None:
    U, D, pieces = problem()
    shut = [Piece(p.x, torch.zeros_like(p.gate), p.missed) for p in pieces]
    assert torch.equal(fit_factor(U, D, shut), U)


def test_ones_in_place_of_the_factor_show_the_gate() -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 3, model.config.hidden_size)
    with factor.constant(mlp.up_proj) as given:
        gate = inputs_of(mlp, "down_proj", x, {})
    assert len(given) == 1
    assert torch.equal(given[0], x)
    torch.testing.assert_close(gate, mlp.act_fn(mlp.gate_proj(x)))
    assert torch.equal(mlp.up_proj(x), torch.nn.functional.linear(x, mlp.up_proj.weight, mlp.up_proj.bias))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_fit_brings_the_model_nearer_to_the_dense_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, text = tiny_model(family), calibration(sequences=48)
    plan = planned(dense, 0.4)
    target = logits(dense, text.input_ids).log_softmax(-1)

    def kl() -> float:
        small = prune_model(loaded(copy.deepcopy(dense)), plan, text, config(refit=0.1)).model
        return float((target.exp() * (target - logits(small, text.input_ids).log_softmax(-1))).sum(-1).mean())

    with_it = kl()
    monkeypatch.setattr(Block, "_fit_factor", lambda *_: None)
    assert with_it < kl()
