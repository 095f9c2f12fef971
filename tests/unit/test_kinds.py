"""Blocks of several kinds in one model: what is planned, measured and said of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from slimexport.architectures import architecture_of
from slimexport.artifacts import CalibrationSet, ModelSource, TextSource
from slimexport.config import RunConfig
from slimexport.errors import BadInputError
from slimexport.loading import LoadedModel, Located, fingerprint
from slimexport.precisions import stays_in_float32
from slimexport.pruning.planner import make_plan, ratio_of
from slimexport.pruning.stage import measure_model, prune_model, search_settings
from slimexport.testing import VOCAB, tiny_config, tiny_model

MIXED = {"lfm2": {}, "lfm2_moe": {}, "qwen3_5_text": {}, "qwen3_next": {}, "qwen3_moe": {"mlp_only_layers": [1]}}
CONFIG = RunConfig(model="tiny", device="cpu", group_size_start=8, curvature_tokens=128, probe_tokens=64, round_to=8)


def calibration() -> CalibrationSet:
    ids = torch.randint(3, VOCAB, (8, 32), generator=torch.Generator().manual_seed(3))
    return CalibrationSet(ids, TextSource("random", ids.numel(), "0" * 64), 0)


def loaded(model: torch.nn.Module) -> LoadedModel:
    source = ModelSource("tiny", "directory", ".", None, "0" * 16, "float32")
    return LoadedModel(model, None, architecture_of(model.config, "tiny"), source)


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("layout", ["per_layer", "uniform"])
def test_plans_reach_the_ratio_and_leave_alone_what_is_not_there(family: str, layout: str) -> None:
    architecture = architecture_of(tiny_config(family, **MIXED[family]), "tiny")
    allocation = "uniform" if layout == "uniform" else "incremental"
    plan = make_plan(architecture, ratio=0.2, criterion="slimgpt", allocation=allocation, layout=layout, round_to=1)
    assert plan.ratio == pytest.approx(0.2, abs=0.02)
    removed = sum(
        own.block_linear_parameters(dense) - own.block_linear_parameters(kept)
        for own, dense, kept in zip(architecture.by_block, plan.dense, plan.blocks, strict=True)
    )
    assert removed == plan.dense_estimates.block_parameters - plan.estimates.block_parameters
    without = {part: [i for i, own in enumerate(architecture.by_block) if not getattr(own, f"has_{part}")]
               for part in ("heads", "channels")}  # fmt: skip
    assert any(without.values())
    for part, blocks in without.items():
        assert any(note.startswith(f"no {part} to prune in block") for note in plan.notes) == bool(blocks)
    if layout == "per_layer":
        for i in without["heads"]:
            assert plan.blocks[i].query_heads == plan.dense[i].query_heads
        for i in without["channels"]:
            assert plan.blocks[i].channels == plan.dense[i].channels


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("allocation", ["sensitivity", "search"])
def test_costs_are_measured_where_there_is_something_to_remove(family: str, allocation: str, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(family, **MIXED[family]))
    of = loaded(model)
    before = copy.deepcopy(model.state_dict())
    config = CONFIG.model_copy(update={"allocation": allocation, "ratio": 0.2, "search_evaluations": 6})
    costs = measure_model(of, calibration(), config, supernet=tmp_path / "supernet")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for own, dense, block in zip(of.architecture.by_block, of.architecture.blocks, costs.blocks, strict=True):
        assert (len(block.heads) > 1) == own.has_heads
        assert (len(block.channels) > 1) == own.has_channels
        assert {c.channels for c in block.channels} >= {dense.channels}
    search = search_settings(of, calibration(), config, supernet=tmp_path / "supernet")
    plan = make_plan(
        of.architecture, ratio=0.2, criterion="slimgpt", allocation=allocation, layout="per_layer", round_to=8,
        costs=costs, search=search,
    )  # fmt: skip
    assert plan.ratio == pytest.approx(0.2, abs=0.03)
    made = prune_model(of, plan, calibration(), config)
    assert ratio_of(of.architecture, architecture_of(made.model.config, "small").blocks) == pytest.approx(plan.ratio)


@pytest.mark.parametrize("criterion", ["taylor", "taylor_lora", "flap", "fasp", "wanda_sp", "magnitude", "random"])
@pytest.mark.parametrize("family", ["qwen3_5_text", "glm4_moe", "phimoe"])
def test_every_criterion_prunes_them(family: str, criterion: str) -> None:
    of = loaded(tiny_model(tiny_config(family)))
    plan = make_plan(
        of.architecture, ratio=0.2, criterion=criterion, allocation="incremental", layout="per_layer", round_to=8
    )
    config = CONFIG.model_copy(update={"criterion": criterion, "refit": 0.0})
    small = prune_model(of, plan, calibration(), config).model
    with torch.no_grad():
        assert torch.isfinite(small(calibration().input_ids[:1], use_cache=False).logits).all()
    shapes = {name: tuple(t.shape) for name, t in small.state_dict().items()}
    of.architecture.with_blocks(plan.blocks).check_weights(shapes, "small")


def test_what_a_block_has_not_cannot_be_asked_for(tmp_path: Path) -> None:
    architecture = architecture_of(tiny_config("lfm2_moe"), "tiny")
    table = tmp_path / "sizes.json"

    def planned(**changes: int) -> None:
        sizes = [
            {"kv_groups": b.kv_groups, "heads_per_group": b.heads_per_group, "channels": b.channels}
            for b in architecture.blocks
        ]
        sizes[0] |= changes
        table.write_text(json.dumps(sizes))
        make_plan(architecture, ratio=None, criterion="slimgpt", allocation="explicit", layout="per_layer",
                  round_to=8, table=table)  # fmt: skip

    with pytest.raises(BadInputError, match="block 0: the heads of this block are not pruned"):
        planned(heads_per_group=1)
    with pytest.raises(BadInputError, match="block 0: the channels of this block are not pruned: leave them at 40"):
        planned(channels=8)


def test_shared_experts_that_a_config_measures_by_the_same_field() -> None:
    architecture = architecture_of(tiny_config("glm4_moe"), "tiny")
    with pytest.raises(BadInputError, match="moe_intermediate_size says the width of the shared experts too"):
        make_plan(architecture, ratio=0.2, criterion="slimgpt", allocation="uniform", layout="uniform", round_to=8)


def test_routers_stay_in_float32() -> None:
    model = tiny_model(tiny_config("glm4_moe"))
    name = "model.layers.1.mlp.gate.weight"
    assert stays_in_float32(model, name, torch.bfloat16)
    assert not stays_in_float32(model, "model.layers.1.mlp.shared_experts.gate_proj.weight", torch.bfloat16)
    assert not stays_in_float32(model, name, torch.float32)
    of = loaded(model)
    plan = make_plan(
        of.architecture, ratio=0.1, criterion="slimgpt", allocation="incremental", layout="per_layer", round_to=8
    )
    small = prune_model(of, plan, calibration(), CONFIG.model_copy(update={"save_dtype": "bfloat16"})).model
    assert small.get_parameter(name).dtype == torch.float32
    assert small.get_parameter("model.layers.1.self_attn.o_proj.weight").dtype == torch.bfloat16


def test_code_that_is_run_is_part_of_the_model(tmp_path: Path) -> None:
    located, trusted = (Located("model", "directory", tmp_path, trusted=trusted) for trusted in (False, True))
    (tmp_path / "config.json").write_text("{}")
    found = []
    for code in ("x = 1", "x = 2"):
        (tmp_path / "modeling_own.py").write_text(code)
        found.append((fingerprint(located), fingerprint(trusted)))
    assert found[0][0] == found[1][0] != found[0][1] != found[1][1]
