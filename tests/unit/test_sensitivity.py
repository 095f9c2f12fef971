"""Measured costs against the slow, direct way: whole models run from the embedding, least squares solved anew."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from models import VOCAB, tiny_model
from test_engine import calibration, config, loaded
from test_obs import brute_force_heads, least_squares, problem

from slimexport.architectures import architecture_of
from slimexport.artifacts import BlockSizes, CostTable
from slimexport.errors import BadInputError
from slimexport.pruning import grid, obs
from slimexport.pruning.blocks import ModelBlocks
from slimexport.pruning.forward import Settings, first_states
from slimexport.pruning.grid import POSITIONS
from slimexport.pruning.inverse import damped_inverse
from slimexport.pruning.probe import output_logits
from slimexport.pruning.sensitivity import channel_curve, head_curve, interpolate, measure_costs
from slimexport.pruning.stage import measure_model
from slimexport.testing import models as testing

HEADS, CHANNELS = "self_attn.o_proj", "mlp.down_proj"
DAMPING, ROUND_TO = 0.01, 16


def tokens(sequences: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(VOCAB, (sequences, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["llama", "gpt_neo", "falcon"])
def test_logits_are_those_of_every_sequence(family: str) -> None:
    """Blocks of some families give a tuple."""
    model = testing.tiny_model(testing.tiny_config(family))
    logits = output_logits(model, architecture_of(model.config, "tiny"), torch.device("cpu"), every=1)
    states = torch.randn(4, 12, model.config.hidden_size)
    with torch.no_grad():
        alone = torch.cat([logits(one) for one in states.split(1)])
        torch.testing.assert_close(logits(states), alone)
    assert alone.shape == (4, 12, model.config.vocab_size)


def measured(model: Any, known: torch.Tensor, probed: torch.Tensor, **changes: Any) -> CostTable:
    architecture = architecture_of(model.config, "tiny")
    settings = Settings(torch.device("cpu"), torch.float64, 8, 1, DAMPING)
    states, arguments = first_states(model, architecture, known, settings)
    probes, probe_arguments = first_states(model, architecture, probed, settings, whole=True)
    return measure_costs(**{
        "source": ModelBlocks(model, architecture), "states": states, "arguments": arguments, "probes": probes[0],
        "probe_arguments": lambda block: probe_arguments(block, 0),
        "logits": output_logits(model, architecture, settings.device), "architecture": architecture,
        "settings": settings, "round_to": ROUND_TO, "identity": {"model": "tiny"}, **changes,
    })  # fmt: skip


def dense_H(model: Any, ids: torch.Tensor, index: int, name: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    module = model.model.layers[index].get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    X = seen[0].reshape(-1, seen[0].shape[-1]).double()
    return X.T @ X / len(X)


def direct_kl(model: Any, changed: Any, ids: torch.Tensor) -> float:
    """Mean over the scored positions, from the logits of two whole models."""
    with torch.no_grad():
        dense, other = (m(ids, use_cache=False).logits.double().log_softmax(-1) for m in (model, changed))
    kl = (dense.exp() * (dense - other)).sum(-1)
    return float(kl[:, POSITIONS - 1 :: POSITIONS].mean())


def candidates(model: Any, ids: torch.Tensor, index: int) -> list[tuple[str, Any, torch.Tensor]]:
    """Every size of a block with the masked, compensated matrix that pruning would make of it."""
    architecture = architecture_of(model.config, "tiny")
    dense, made = architecture.blocks[index], []
    W, H = _matrix(model, index, HEADS), dense_H(model, ids, index, HEADS)
    inverse, *_ = damped_inverse(H, DAMPING)
    for groups in range(1, dense.kv_groups + 1):
        for per_group in range(1, dense.heads_per_group + 1):
            found = obs.select_heads(
                W, inverse, kv_groups=dense.kv_groups, heads_per_group=dense.heads_per_group,
                head_dim=architecture.head_dim, keep_groups=groups, keep_per_group=per_group,
            )  # fmt: skip
            made.append((HEADS, (groups, per_group), found.W))
    W, H = _matrix(model, index, CHANNELS), dense_H(model, ids, index, CHANNELS)
    inverse, *_ = damped_inverse(H, DAMPING)
    for count in grid.legal_channels(dense.channels, ROUND_TO):
        # All at once between two legal counts, as the curve goes.
        state = obs.Eliminator(W, inverse)
        for _ in range((dense.channels - count) // ROUND_TO):
            state.eliminate(state.channel_scores().sort(stable=True).indices[:ROUND_TO])
        made.append((CHANNELS, count, state.W))
    return made


def _matrix(model: Any, index: int, name: str) -> torch.Tensor:
    return model.model.layers[index].get_submodule(name).weight.double()


# -------------------------------------------------------------------------------------------------- measured costs


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_measured_costs_are_the_kl_of_whole_masked_models(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    known, probed = tokens(6, 24, seed=1), tokens(3, 24, seed=2)
    table = measured(model, known, probed)
    assert table.tokens == 72
    architecture = architecture_of(model.config, "tiny")
    for index, costs in enumerate(table.blocks):
        heads = {(c.kv_groups, c.heads_per_group): c.cost for c in costs.heads}
        channels = {c.channels: c.cost for c in costs.channels}
        assert heads[3, 2] == channels[80] == 0
        direct: dict[tuple[str, Any], float] = {}
        for name, size, W in candidates(model, known, index):
            masked = copy.deepcopy(model)
            masked.model.layers[index].get_submodule(name).weight.data = W
            direct[name, size] = direct_kl(model, masked, probed)
        dense = architecture.blocks[index]
        share = {
            s: architecture.attention_parameters(BlockSizes(*s, 80)) / architecture.attention_parameters(dense)
            for s in heads
        }
        for wanted in grid.PROBED_SHARES:
            size = min(share, key=lambda s: abs(share[s] - wanted))
            assert heads[size] == pytest.approx(direct[HEADS, size], rel=2e-3)
            count = min(channels, key=lambda c: abs(c / 80 - wanted))
            assert channels[count] == pytest.approx(direct[CHANNELS, count], rel=2e-3)
        # What lies between and beyond is an estimate: of the right size.
        for (name, size), kl in direct.items():
            estimate = (heads if name == HEADS else channels)[size]
            assert estimate == pytest.approx(kl, rel=1.5, abs=1e-6)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])  # with a tied head, and with one of its own
def test_the_head_of_a_model_in_half_precision_runs_in_float32(family: str) -> None:
    """Logits rounded to bfloat16 would differ by more than a small cut costs."""
    model = tiny_model(family, dtype=torch.bfloat16)
    architecture, cpu = architecture_of(model.config, "tiny"), torch.device("cpu")
    states = torch.randn(2, 10, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = output_logits(model, architecture, cpu)(states)
        theirs = output_logits(copy.deepcopy(model).float(), architecture, cpu)(states)
        after = model.lm_head(model.model.norm(states.bfloat16()))
    assert torch.equal(ours, theirs)
    assert ours.shape == (2, 10 // POSITIONS, VOCAB)
    assert after.dtype == torch.bfloat16
    assert (after.float()[:, POSITIONS - 1 :: POSITIONS] - ours).abs().max() > 1e-3


def test_the_model_is_left_as_it_was_and_the_table_is_the_same_twice() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama", dtype=dtype)
        before, forwards = copy.deepcopy(model.state_dict()), [vars(m).get("forward") for m in model.modules()]
        one, two = (measure_model(loaded(model), calibration(), config(probe_tokens=64)) for _ in range(2))
        assert dataclasses.replace(one, seconds=0.0) == dataclasses.replace(two, seconds=0.0)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
        assert [vars(m).get("forward") for m in model.modules()] == forwards
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        assert one.tokens == 64
        assert one.identity["model"] == "f"
        assert all(math.isfinite(c.cost) and c.cost >= 0 for b in one.blocks for c in (*b.heads, *b.channels))


def test_one_calibration_sequence_is_enough() -> None:
    model = tiny_model("qwen2")
    table = measure_model(loaded(model), calibration(1, 32), config(probe_tokens=1024))
    assert table.tokens == 32


def test_activations_that_overflow_are_bad_input() -> None:
    model = tiny_model("llama", dtype=torch.float16)
    model.model.layers[1].mlp.up_proj.weight.data *= 6e4
    with pytest.raises(BadInputError, match=r"block 1 overflow in float16: use --dtype float32 \(or bfloat16\)"):
        measure_model(loaded(model), calibration(), config(dtype="float16"))


# ---------------------------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize("seed", range(3))
def test_errors_of_heads_are_those_of_brute_force(seed: int) -> None:
    model = tiny_model("llama", num_attention_heads=6, num_key_value_heads=3, head_dim=2)
    architecture = architecture_of(model.config, "tiny")
    W, H, _ = problem(5, 12, seed=seed)
    raw = H - 0.01 / 1.01 * H.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    curve = head_curve(W, damped_inverse(raw, 0.01), BlockSizes(3, 2, 80), architecture, searched=True)
    assert set(curve.errors) == {(g, h) for g in (1, 2, 3) for h in (1, 2)}
    for (groups, per_group), error in curve.errors.items():
        _, expected = brute_force_heads(W, H, 3, 2, 2, groups, per_group)
        assert error == pytest.approx(expected, rel=1e-6, abs=1e-10)
    assert set(curve.cuts) == set(curve.errors) - {(3, 2)}
    for size, cut in curve.cuts.items():
        columns = cut.columns.tolist()
        assert len(columns) == 2 * size[0] * size[1]
        best, error = least_squares(W, H, columns)
        torch.testing.assert_close(cut.W.double(), best[:, columns], rtol=1e-5, atol=1e-6)
        assert curve.errors[size] == pytest.approx(error, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize(("channels", "round_to"), [(24, 4), (22, 4), (24, 1), (3, 8), (9, 8)])
def test_errors_of_channels_are_those_of_brute_force(channels: int, round_to: int) -> None:
    W, H, _ = problem(5, channels)
    raw = H - 0.01 / 1.01 * H.diagonal().mean() * torch.eye(channels, dtype=torch.float64)
    curve = channel_curve(W, damped_inverse(raw, 0.01), BlockSizes(1, 1, channels), round_to, searched=True)
    counts = grid.legal_channels(channels, round_to)
    assert list(curve.errors) == counts
    assert curve.errors[channels] == 0
    kept = list(range(channels))
    for count in counts[1:]:
        _, base = least_squares(W, H, kept)
        rest = {c: least_squares(W, H, [j for j in kept if j != c])[1] - base for c in kept}
        gone = sorted(kept, key=lambda c: rest[c])[: len(kept) - count]
        kept = [c for c in kept if c not in gone]
        best, error = least_squares(W, H, kept)
        assert curve.errors[count] == pytest.approx(error, rel=1e-6, abs=1e-10)
        if count in curve.cuts:
            assert curve.cuts[count].columns.tolist() == kept
            torch.testing.assert_close(curve.cuts[count].W.double(), best[:, kept], rtol=1e-5, atol=1e-6)
    assert list(curve.errors.values()) == sorted(curve.errors.values())
    assert len(curve.probed) == min(3, len(counts) - 1)
    assert set(curve.cuts) == {*curve.probed, *curve.searched} - {channels}
    assert set(curve.searched) >= {counts[0], counts[-1]}
    assert len(curve.searched) == min(len(counts), 12)


def test_dead_inputs_cost_nothing() -> None:
    W, H, _ = problem(5, 12)
    H[[2, 9]] = 0
    H[:, [2, 9]] = 0
    curve = channel_curve(W, damped_inverse(H, 0.01), BlockSizes(1, 1, 12), 2)
    assert curve.errors[10] == pytest.approx(0, abs=1e-12)
    assert curve.errors[8] > 1e-6


def test_legal_channels() -> None:
    assert grid.legal_channels(80, 32) == [80, 64, 32]
    assert grid.legal_channels(64, 32) == [64, 32]
    assert grid.legal_channels(20, 32) == [20]
    assert grid.legal_channels(3, 1) == [3, 2, 1]


# --------------------------------------------------------------------------------------------------- interpolation


def test_interpolation_passes_through_what_was_measured_and_rises() -> None:
    errors = {n: float(2**-n) for n in range(1, 10)} | {99: 0.0}
    known = {2: 0.5, 5: 0.1, 7: 0.01}
    costs = interpolate(errors, known)
    assert list(costs) == list(errors)
    for size, cost in known.items():
        assert costs[size] == pytest.approx(cost, rel=1e-12)
    assert costs[99] == 0
    rising = [costs[n] for n in range(9, 0, -1)]
    assert rising == sorted(rising)
    assert len(set(rising)) == len(rising)


def test_lines_go_on_with_slope_one_below_and_between_one_half_and_two_above() -> None:
    errors = {n: math.exp(n) for n in range(7)}
    steep, flat, falling = (interpolate(errors, {2: 1.0, 4: math.exp(2 * k)}) for k in (5, 0.1, -1))
    assert [steep[n] for n in (1, 5)] == pytest.approx([math.exp(-1), math.exp(12)])
    assert [flat[n] for n in (1, 5)] == pytest.approx([math.exp(-1), math.exp(0.7)])
    assert [falling[n] for n in (1, 5)] == pytest.approx([math.exp(-1), math.exp(-1.5)])
    assert steep[3] == pytest.approx(math.exp(5))


def test_interpolation_with_little_to_go_by() -> None:
    errors = {0: 4.0, 1: 2.0, 2: 1.0, 3: 0.0}
    assert interpolate(errors, {}) == {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}
    assert interpolate(errors, {1: 0.0, 2: 0.0}) == {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}
    assert interpolate(errors, {1: 0.3}) == pytest.approx({0: 0.6, 1: 0.3, 2: 0.15, 3: 0.0})  # in proportion
    assert interpolate(errors, {3: 0.3}) == {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}  # nothing known where there is error
    assert interpolate(errors, {0: 0.8, 2: 0.0})[2] == 0.8  # a zero counts as the smallest that is not
    same = interpolate({0: 1.0, 1: 1.0, 2: 2.0}, {0: 0.1, 1: 0.3})
    assert same == pytest.approx({0: 0.1, 1: 0.1, 2: 0.2})  # two at the same error: the first


@pytest.mark.parametrize("seed", range(20))
def test_interpolation_is_monotone_for_monotone_measurements(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    errors = dict(enumerate(torch.rand(30, generator=g).mul(20).exp().sort().values.tolist()))
    count = int(torch.randint(1, 6, (1,), generator=g))
    sizes = sorted(torch.randperm(30, generator=g)[:count].tolist())
    costs = interpolate(errors, dict(zip(sizes, torch.rand(count, generator=g).sort().values.tolist(), strict=True)))
    values = [costs[n] for n in range(30)]
    assert values == sorted(values)
