"""Curvature of the model's output against whole-model gradients, and weighted choices against enumeration."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from models import FAMILIES, tiny_config, tiny_model
from test_criteria import HEAD_DIM, legal_sets, normal, problem
from test_engine import calibration, config, loaded, logits, planned
from test_obs import least_squares

from slimexport.architectures import architecture_of
from slimexport.artifacts import BlockSizes
from slimexport.errors import BadInputError
from slimexport.pruning.blocks import ModelBlocks
from slimexport.pruning.criteria import Site, registry
from slimexport.pruning.curvature import DAMPING, Weighting, measure_curvature, unweighted, weighted
from slimexport.pruning.forward import Settings, first_states
from slimexport.pruning.grid import PROBE_LENGTH
from slimexport.pruning.inverse import damped_inverse
from slimexport.pruning.probe import output_scores
from slimexport.pruning.sensitivity import channel_curve, head_curve
from slimexport.pruning.stage import curvature_of, measure_model, prune_model

OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")
CPU = torch.device("cpu")


def measured(model: Any, ids: torch.Tensor, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    architecture = architecture_of(model.config, "tiny")
    settings = Settings(CPU, torch.float64, 8, 1, 0.01)
    states, arguments = first_states(model, architecture, ids, settings)
    scores = output_scores(model, architecture, CPU, seed)
    found = measure_curvature(
        source=ModelBlocks(model, architecture), states=states, arguments=arguments, scores=scores,
        architecture=architecture, settings=settings,
    )  # fmt: skip
    return [dict(block) for block in found]


def direct(model: Any, ids: torch.Tensor, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Hooks in the whole model, one sequence at a time, all gradients by one call of autograd."""
    outputs: dict[tuple[int, str], torch.Tensor] = {}
    for index, block in enumerate(model.model.layers):
        for name in OUTPUTS:
            block.get_submodule(name).register_forward_hook(
                lambda _m, _args, result, key=(index, name): outputs.__setitem__(key, result)
            )
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[int, str], Any] = {}
    for sequence in ids.split(1):
        embedded = model.get_input_embeddings()(sequence).requires_grad_()
        rows = model(inputs_embeds=embedded, use_cache=False).logits[0]
        drawn = torch.multinomial(rows.detach().float().softmax(-1), 1, generator=generator)
        nll = -rows.log_softmax(-1).gather(1, drawn).sum()
        for key, gradient in zip(outputs, torch.autograd.grad(nll, list(outputs.values())), strict=True):
            for g in gradient[0]:
                found[key] = found.get(key, 0) + torch.outer(g, g) / ids.numel()
    return [{name: found[index, name] for name in OUTPUTS} for index in range(len(model.model.layers))]


@pytest.mark.parametrize("family", FAMILIES)
def test_curvature_is_that_of_the_whole_model(family: str) -> None:
    model, ids = tiny_model(family, dtype=torch.float64), calibration(5, 20).input_ids
    for block, slow in zip(measured(model, ids), direct(copy.deepcopy(model), ids), strict=True):
        for name in OUTPUTS:
            assert block[name].dtype == torch.float32
            torch.testing.assert_close(block[name].double(), slow[name], rtol=2e-4, atol=1e-5 * slow[name].max().item())


def test_other_seeds_draw_other_tokens() -> None:
    model, ids = tiny_model(), calibration(3, 20).input_ids
    one, two = measured(model, ids, 0), measured(model, ids, 1)
    assert not torch.equal(one[0][OUTPUTS[0]], two[0][OUTPUTS[0]])


def test_weighting_is_a_root_of_the_damped_curvature() -> None:
    g = normal(30, 6, seed=1)
    G = g.T @ g / 30
    found = Weighting.of(G.float(), CPU)
    assert found is not None
    damped = G + DAMPING * G.diagonal().mean() * torch.eye(6)
    torch.testing.assert_close(found.R.T @ found.R, damped, rtol=1e-5, atol=1e-6)
    W = normal(6, 4, seed=2).masked_fill(torch.arange(4) == 2, 0.0)
    back = unweighted(weighted(W, found), found)
    torch.testing.assert_close(back, W, rtol=0, atol=1e-12)
    assert not back[:, 2].any()
    assert Weighting.of(torch.zeros(6, 6), CPU) is None
    assert Weighting.of(None, CPU) is None
    assert weighted(W, None) is unweighted(W, None) is W


def weighed(seed: int, structure: tuple[int, int, int, int] | None) -> tuple[Site, torch.Tensor]:
    """A problem whose outputs count very differently, and its damped G."""
    site = problem(seed, structure).site
    g = normal(40, len(site.W), seed=seed + 900) * normal(len(site.W), seed=seed + 901).mul(2).exp()
    G = g.T @ g / 40
    damped = G + DAMPING * G.diagonal().mean() * torch.eye(len(G))
    return dataclasses.replace(site, weighting=Weighting.of(G, CPU)), damped


def weighted_error(site: Site, G: torch.Tensor, W: torch.Tensor) -> float:
    inverse, *_ = damped_inverse(site.H, site.damping)
    D = W - site.W
    return float((D.T @ G @ D * torch.linalg.inv(inverse)).sum())


def repaired(site: Site, kept: list[int]) -> torch.Tensor:
    inverse, *_ = damped_inverse(site.H, site.damping)
    return least_squares(site.W, torch.linalg.inv(inverse), kept)[0]


@pytest.mark.parametrize("seed", range(4))
def test_channels_go_in_the_order_of_what_their_loss_costs_the_output(seed: int) -> None:
    site, G = weighed(seed, None)
    site = dataclasses.replace(site, group_size_start=1, group_size_end=1)
    kept = list(range(site.W.shape[1]))
    while len(kept) > site.keep.channels:
        without = [[c for c in kept if c != gone] for gone in kept]
        kept = min(without, key=lambda rest: weighted_error(site, G, repaired(site, rest)))
    found, _ = registry.get("slimgpt").channels(site)
    assert list(found.kept) == kept
    torch.testing.assert_close(found.W, repaired(site, kept), rtol=1e-8, atol=1e-10)
    assert found.error == pytest.approx(weighted_error(site, G, found.W), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("structure", [(3, 2, 2, 2), (1, 4, 1, 3), (2, 3, 2, 2)])  # one move each
def test_heads_go_by_what_their_loss_costs_the_output(structure: tuple[int, int, int, int], seed: int) -> None:
    site, G = weighed(seed, structure)

    def columns(heads: tuple[int, ...]) -> list[int]:
        return [h * HEAD_DIM + d for h in heads for d in range(HEAD_DIM)]

    best = min(legal_sets(site.dense, site.keep), key=lambda h: weighted_error(site, G, repaired(site, columns(h))))
    found, _ = registry.get("slimgpt").heads(site)
    assert found.kept == best
    torch.testing.assert_close(found.W, repaired(site, columns(best)), rtol=1e-8, atol=1e-10)


def test_outputs_that_count_differently_change_the_choice() -> None:
    """Else the tests above would pass without any weighting."""
    changed = 0
    for seed in range(4):
        site, _ = weighed(seed, None)
        plain = dataclasses.replace(site, weighting=None)
        found, other = (registry.get("slimgpt").channels(s)[0].kept for s in (site, plain))
        changed += found != other
    assert changed


def test_equal_weights_choose_as_none() -> None:
    site = problem(0).site
    weighting = Weighting.of(torch.eye(len(site.W)) * 3, CPU)
    found, _ = registry.get("slimgpt").channels(dataclasses.replace(site, weighting=weighting))
    plain, _ = registry.get("slimgpt").channels(site)
    assert found.kept == plain.kept
    torch.testing.assert_close(found.W, plain.W)


# ------------------------------------------------------------------------------------------------------- the stage


def test_given_curvature_is_what_would_be_measured() -> None:
    model, text, settings = tiny_model(), calibration(), config(curvature_tokens=64)
    plan = planned(model, 0.4)
    curvature = curvature_of(loaded(model), text, settings)
    one = prune_model(loaded(copy.deepcopy(model)), plan, text, settings, curvature=curvature)
    two = prune_model(loaded(copy.deepcopy(model)), plan, text, settings)
    assert torch.equal(logits(one.model), logits(two.model))
    tables = [measure_model(loaded(model), text, settings, curvature=c) for c in (curvature, None)]
    assert tables[0].blocks == tables[1].blocks
    assert tables[0].blocks != measure_model(loaded(model), text, config(curvature_tokens=0)).blocks


def test_measuring_leaves_the_model_alone_and_works_where_gradients_are_off() -> None:
    model, text = tiny_model(dtype=torch.bfloat16), calibration()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.inference_mode():
        found = curvature_of(loaded(model), text, config(curvature_tokens=64))
    assert len(found) == 3
    assert all(float(G.diagonal().min()) >= 0 and float(G.diagonal().sum()) > 0 for b in found for G in b.values())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = copy.deepcopy(tiny_model())
    with pytest.raises(BadInputError, match="load the model outside of it"):
        curvature_of(loaded(model), calibration(), config(curvature_tokens=64))


def test_criteria_that_do_not_weigh_get_nothing_to_weigh_by(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text, settings = tiny_model(), calibration(), config(criterion="wanda_sp", curvature_tokens=64)
    seen: list[Site] = []
    criterion = registry.get("wanda_sp")
    channels = criterion.channels
    monkeypatch.setattr(criterion, "channels", lambda site: (seen.append(site), channels(site))[1])
    prune_model(loaded(model), planned(model, 0.4, criterion="wanda_sp"), text, settings)
    assert seen
    assert all(site.weighting is None for site in seen)


def test_nothing_is_measured_where_nothing_is_weighted() -> None:
    model, text = tiny_model(), calibration()
    unread = {"criterion": "flap", "curvature_tokens": 64, "fast": True}
    for off in ({"fast": True}, {"criterion": "flap"}, {"curvature_tokens": 0}, unread):
        assert curvature_of(loaded(model), text, config(**off)) == ()


def test_tokens_are_pieces_from_all_over_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimexport.pruning import stage

    seen: list[torch.Tensor] = []
    real = stage.first_states
    monkeypatch.setattr(stage, "first_states", lambda m, a, ids, s: (seen.append(ids), real(m, a, ids, s))[1])
    text = calibration(12, 32)
    curvature_of(loaded(tiny_model()), text, config(curvature_tokens=96))
    (ids,) = seen
    assert ids.shape == (3, min(32, PROBE_LENGTH))
    assert [row.tolist() for row in ids] == [text.input_ids[i].tolist() for i in (2, 6, 10)]


def test_overflowing_gradients_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimexport.pruning import stage

    monkeypatch.setattr(stage, "output_scores", lambda *_: lambda states: torch.full_like(states, 6e4) * 2)
    with pytest.raises(BadInputError, match="block 2 overflow in float16: use --dtype float32"):
        curvature_of(loaded(tiny_model()), calibration(), config(dtype="float16", curvature_tokens=64))


def test_cost_curves_weigh_channels_as_pruning_does() -> None:
    """The same channels at the same count, and matrices without the weights."""
    site, _ = weighed(1, None)
    n = site.W.shape[1]
    curve = channel_curve(
        site.W, damped_inverse(site.H, site.damping), BlockSizes(1, 1, n), 1, site.weighting, searched=True
    )
    assert len(curve.cuts) > 5
    for count, cut in curve.cuts.items():
        keep = dataclasses.replace(site.keep, channels=count)
        found, _ = registry.get("slimgpt").channels(dataclasses.replace(site, keep=keep, group_size_start=1))
        assert cut.columns.tolist() == list(found.kept)
        torch.testing.assert_close(cut.W.double(), found.W[:, cut.columns], rtol=1e-5, atol=1e-5)


def test_cost_curves_weigh_heads_as_pruning_does() -> None:
    architecture = architecture_of(tiny_config("llama", head_dim=HEAD_DIM), "tiny")
    changed = 0
    for seed in range(4):
        site, G = weighed(seed, (3, 2, 2, 2))
        curve = head_curve(
            site.W, damped_inverse(site.H, site.damping), site.dense, architecture, site.weighting, searched=True
        )
        plain = head_curve(site.W, damped_inverse(site.H, site.damping), site.dense, architecture, searched=True)
        for size, cut in curve.cuts.items():
            torch.testing.assert_close(
                cut.W.double(), repaired(site, cut.columns.tolist())[:, cut.columns], rtol=1e-4, atol=1e-4
            )
            masked = torch.zeros_like(site.W)
            masked[:, cut.columns] = cut.W.double()
            assert curve.errors[size] == pytest.approx(weighted_error(site, G, masked), rel=1e-4)
            changed += cut.columns.tolist() != plain.cuts[size].columns.tolist()
    assert changed


@pytest.mark.gpu
def test_cuda_measures_what_the_cpu_does_and_the_same_again() -> None:
    model, text = tiny_model(), calibration()
    cpu = curvature_of(loaded(model), text, config(curvature_tokens=384))
    settings = config(curvature_tokens=384).model_copy(update={"device": "cuda", "dtype": "float32"})
    once, again = (curvature_of(loaded(model), text, settings) for _ in range(2))
    for ours, theirs, same in zip(cpu, once, again, strict=True):
        for name in OUTPUTS:
            assert torch.equal(theirs[name], same[name])
            # A token or two may be drawn differently: more than rounding, less than another text would make.
            assert (ours[name] - theirs[name]).norm() < 0.2 * ours[name].norm()
