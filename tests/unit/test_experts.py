"""Mixtures of experts: whose inputs are whose, experts that see nothing, and costs of cuts in all of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from slimexport.architectures import architecture_of
from slimexport.artifacts import CalibrationSet, ModelSource, TextSource
from slimexport.checkpoint.load import load_weights
from slimexport.config import RunConfig
from slimexport.loading import LoadedModel
from slimexport.pruning.blocks import kept_of
from slimexport.pruning.experts import ffn_inputs, ffn_matrices
from slimexport.pruning.planner import make_plan
from slimexport.pruning.sensitivity import Curve, joined
from slimexport.pruning.stage import measure_model, prune_model
from slimexport.testing import VOCAB, tiny_config, tiny_model
from slimexport.testing.steps import pruned, saved

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe")
CONFIG = RunConfig(model="tiny", device="cpu", group_size_start=8, curvature_tokens=128, probe_tokens=64, round_to=8)


def calibration() -> CalibrationSet:
    ids = torch.randint(3, VOCAB, (12, 32), generator=torch.Generator().manual_seed(3))
    return CalibrationSet(ids, TextSource("random", ids.numel(), "0" * 64), 0)


def loaded(model: torch.nn.Module) -> LoadedModel:
    architecture = architecture_of(model.config, "tiny")
    source = ModelSource("tiny", "directory", ".", None, "0" * 16, "float32")
    return LoadedModel(model, None, architecture, source)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_of_the_experts_make_their_output(family: str) -> None:
    model = tiny_model(tiny_config(family))
    model.set_experts_implementation("eager")
    name = architecture_of(model.config, "tiny").family.ffn_output
    experts, seen = model.model.layers[1].get_submodule(name), []
    experts.register_forward_hook(lambda _, given, output: seen.append((given, output)))
    with torch.no_grad():
        model(calibration().input_ids[:2], use_cache=False)
        (given, expected) = seen[0]
        made = torch.zeros_like(expected)
        for expert, X in ffn_inputs(experts, given):
            tokens = (given[1] == expert).any(-1)
            made[tokens] += X @ ffn_matrices(experts)[expert].T
    torch.testing.assert_close(made, expected)


def test_an_expert_that_no_token_is_sent_to() -> None:
    model = tiny_model(tiny_config("mixtral"))
    dense = copy.deepcopy(model)
    for layer in (model.model.layers[1], dense.model.layers[1]):
        layer.post_attention_layernorm.weight.data.abs_()
        layer.mlp.gate.weight.data[2] = 0.0  # beside four logits of some size, never among the first two
        layer.mlp.gate.weight.data[:2] = 0.0
        layer.mlp.gate.weight.data[3] = -layer.mlp.gate.weight.data[4]
    plan = make_plan(
        architecture_of(model.config, "tiny"), ratio=0.4, criterion="slimgpt", allocation="incremental",
        layout="per_layer", round_to=8,
    )  # fmt: skip
    made = prune_model(loaded(model), plan, calibration(), CONFIG)
    notes = [note for note in made.trace[1].notes if "saw 0 tokens" in note]
    assert notes
    unseen = int(notes[0].split()[1])
    kept = kept_of(made.trace[1], plan.dense[1], 5).of_expert(unseen)
    old, new = (m.model.layers[1].mlp.experts.down_proj[unseen] for m in (dense, made.model))
    assert torch.equal(new, old[:, list(kept.channels)])  # nothing to compensate by
    norms = old.square().sum(0)
    assert norms[list(kept.channels)].min() >= norms.sort().values[: -len(kept.channels)].max()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_costs_leave_the_model_as_it_is(family: str) -> None:
    model = tiny_model(tiny_config(family))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    costs = measure_model(loaded(model), calibration(), CONFIG)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for block in costs.blocks:
        of_channels = [cost.cost for cost in block.channels]
        assert of_channels[0] == 0
        assert of_channels == sorted(of_channels)
        assert of_channels[-1] > 0


def test_errors_of_experts_add_up_by_their_tokens() -> None:
    curves = [Curve({8: 0.0, 4: 3.0}, [], [], {}), Curve({8: 0.0, 4: 1.0}, [], [], {})]
    assert joined(curves, [10, 30]).errors == {8: 0.0, 4: 1.5}
    assert joined(curves[:1], [10]) is curves[0]


def test_decoding_reads_the_experts_that_a_token_is_sent_to() -> None:
    config = tiny_config("mixtral")
    estimates = architecture_of(config, "tiny").estimates(4)
    one = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    assert estimates.bytes - estimates.decode_bytes_per_token == 4 * 3 * one
    routers = config.num_hidden_layers * config.num_local_experts * config.hidden_size
    assert estimates.prefill_flops_per_token == 2 * (
        estimates.block_parameters - 3 * one + routers + config.vocab_size * config.hidden_size
    )


def test_blocks_of_their_own_sizes_compute_experts_as_the_stock_class_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has not used the stock class yet: transformers remembers on the class what it can do."""
    model = tiny_model(tiny_config("mixtral"))
    stock = type(model)
    _, plan, small, _ = pruned(model, "per_layer")
    assert len(set(plan.blocks)) > 1
    directory = saved(small, plan, tmp_path / "checkpoint")
    for part in ("attn", "experts"):
        monkeypatch.setattr(stock, f"_can_set_{part}_implementation_cached_value", None, raising=False)
    again = load_weights(directory)
    assert type(again) is not stock
    for name in ("_experts_implementation", "_attn_implementation"):
        assert getattr(again.config, name) == getattr(small.config, name)
    again.set_experts_implementation("eager")
