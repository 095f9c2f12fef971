"""The factor on the logits: against a search over it, and where it ends up."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny_model
from test_engine import calibration, config, loaded, logits, planned

from slimexport.pruning.readout import LIMITS, fit_scale, held_out
from slimexport.pruning.stage import prune_model


def divergence(dense: torch.Tensor, z: torch.Tensor, scale: float) -> float:
    p, q = dense.log_softmax(-1), (scale * z).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_the_scale_is_the_one_of_least_divergence(seed: int, noise: float) -> None:
    g = torch.Generator().manual_seed(seed)
    dense = 2 * torch.randn(30, 50, generator=g, dtype=torch.float64)
    z = 1.2 * dense + noise * torch.randn(30, 50, generator=g, dtype=torch.float64)
    found = fit_scale(dense.split(10), z.split(10))
    grid = torch.linspace(*LIMITS, 10_001).tolist()
    assert found == pytest.approx(min(grid, key=lambda s: divergence(dense, z, s)), abs=2e-4)
    if not noise:
        assert found == pytest.approx(1 / 1.2, abs=1e-6)


def test_logits_that_say_nothing_leave_it_as_it_is() -> None:
    assert fit_scale([torch.randn(4, 9)], [torch.zeros(4, 9)]) == 1.0


def test_which_sequences_are_held_out() -> None:
    assert held_out(7, 512) == []
    assert len(held_out(8, 512)) == 1
    assert held_out(128, 512) == sorted(set(held_out(128, 512)))
    assert len(held_out(128, 512)) == 4
    assert len(held_out(4096, 2048)) == 2
    assert min(held_out(128, 512)) > 0
    assert max(held_out(128, 512)) < 127


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_final_norm_takes_it(family: str) -> None:
    dense, text = tiny_model(family), calibration(sequences=16)
    plan = planned(dense, 0.4)
    made = prune_model(loaded(copy.deepcopy(dense)), plan, text, config(refit=0.1))
    assert made.logit_scale != 1.0
    wanted = dense.model.norm.weight * made.logit_scale
    torch.testing.assert_close(made.model.model.norm.weight, wanted)
    # It is what is best on the sequences that were held out, as their whole logits say.
    aside = text.input_ids[held_out(*text.input_ids.shape)]
    target, z = logits(dense, aside)[:, 3::4].double(), logits(made.model, aside)[:, 3::4].double() / made.logit_scale
    best = divergence(target, z, made.logit_scale)
    assert all(best <= divergence(target, z, made.logit_scale + off) for off in (-0.02, 0.02))


def test_a_head_with_a_bias_leaves_the_final_norm() -> None:
    """Logits do not grow with the norm there, even in a family whose others do."""
    dense = tiny_model("llama")
    dense.lm_head.bias = torch.nn.Parameter(torch.randn(dense.lm_head.out_features))
    made = prune_model(loaded(copy.deepcopy(dense)), planned(dense, 0.4), calibration(sequences=16), config(refit=0.1))
    assert made.logit_scale == 1.0
    assert torch.equal(made.model.model.norm.weight, dense.model.norm.weight)


def test_the_paper_alone_leaves_the_final_norm() -> None:
    dense = tiny_model("llama")
    made = prune_model(loaded(copy.deepcopy(dense)), planned(dense, 0.4), calibration(sequences=16), config(refit=0.0))
    assert made.logit_scale == 1.0
    assert torch.equal(made.model.model.norm.weight, dense.model.norm.weight)
