"""Plans: legal, rounded, and within half a percent of the ratio asked."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimexport.architectures import registry
from slimexport.architectures.base import Architecture
from slimexport.artifacts import BlockSizes, PruningPlan
from slimexport.errors import BadInputError
from slimexport.pruning.allocation import TOLERANCE, Request
from slimexport.pruning.allocation import registry as allocations
from slimexport.pruning.planner import head_structures, make_plan, ratio_of


def architecture(family: str = "llama", *, blocks: int = 30, hidden: int = 576, head_dim: int = 64,
                 sizes: BlockSizes = BlockSizes(3, 3, 1536)) -> Architecture:  # fmt: skip
    return Architecture(registry.get(family), hidden, head_dim, 49152, True, (sizes,) * blocks, frozenset())


def plan(ratio: float, arch: Architecture | None = None, **options: object) -> PruningPlan:
    defaults = {"criterion": "slimgpt", "allocation": "incremental", "layout": "per_layer"}
    return make_plan(arch or architecture(), ratio=ratio, **{**defaults, **options})  # type: ignore[arg-type]


def assert_legal(made: PruningPlan, round_to: int = 32) -> None:
    for dense, kept in zip(made.dense, made.blocks, strict=True):
        assert 1 <= kept.kv_groups <= dense.kv_groups
        assert 1 <= kept.heads_per_group <= dense.heads_per_group
        assert 1 <= kept.channels <= dense.channels
        assert kept.channels % round_to == 0 or kept.channels == dense.channels


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("allocation", ["incremental", "uniform"])
def test_plans_are_legal_and_hit_the_ratio(ratio: float, allocation: str) -> None:
    made = plan(ratio, allocation=allocation)
    assert_legal(made)
    assert abs(made.ratio - ratio) <= TOLERANCE
    assert made.ratio == pytest.approx(ratio_of(architecture(), made.blocks))
    removed = 1 - made.estimates.block_parameters / made.dense_estimates.block_parameters
    assert removed == pytest.approx(made.ratio)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 8), per_group=st.integers(1, 6), channels=st.integers(64, 900), blocks=st.integers(1, 12),
    ratio=st.floats(0.01, 0.6), round_to=st.sampled_from([1, 8, 32]),
    allocation=st.sampled_from(["incremental", "uniform"]),
)  # fmt: skip
def test_any_shape_gives_a_legal_plan(groups, per_group, channels, blocks, ratio, round_to, allocation) -> None:  # type: ignore[no-untyped-def]
    arch = architecture(
        "mistral", blocks=blocks, hidden=128, head_dim=16, sizes=BlockSizes(groups, per_group, channels)
    )
    smallest = [BlockSizes(1, 1, min(round_to, channels))] * blocks
    if ratio > ratio_of(arch, smallest) + TOLERANCE:
        with pytest.raises(BadInputError, match="the most that can be removed"):
            plan(ratio, arch, allocation=allocation, round_to=round_to)
        return
    made = plan(ratio, arch, allocation=allocation, round_to=round_to)
    assert_legal(made, round_to)
    step = round_to * arch.channel_parameters() / sum(map(arch.block_linear_parameters, arch.blocks))
    assert abs(made.ratio - ratio) <= max(TOLERANCE, step) or made.notes


def test_ratio_zero_keeps_everything() -> None:
    made = plan(0.0)
    assert made.blocks == made.dense
    assert made.ratio == 0


def test_incremental_rises_with_the_logarithm_of_depth() -> None:
    wanted = allocations.get("incremental")(Request(architecture(), 0.3, first_ratio=0.1))
    assert wanted[0] == pytest.approx(0.1)
    assert sum(wanted) / 30 == pytest.approx(0.3)
    for i in (1, 7, 29):
        assert (wanted[i] - 0.1) / (wanted[-1] - 0.1) == pytest.approx(math.log(i + 1) / math.log(30))


def test_what_clipping_cuts_off_is_handed_on() -> None:
    made = plan(0.85, first_ratio=0.2)
    assert abs(made.ratio - 0.85) <= TOLERANCE


def test_too_much_says_the_most_that_is_possible() -> None:
    with pytest.raises(BadInputError, match=r"the most that can be removed from this model is 0\.9"):
        plan(0.995)
    with pytest.raises(BadInputError, match=r"the most that can be removed"):
        plan(0.995, layout="uniform", allocation="uniform")


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.5])
def test_uniform_layout_has_one_size_that_a_plain_config_can_say(ratio: float) -> None:
    made = plan(ratio, layout="uniform", allocation="uniform")
    assert len(set(made.blocks)) == 1
    assert 576 % made.blocks[0].query_heads == 0
    assert abs(made.ratio - ratio) <= TOLERANCE


def test_uniform_layout_of_a_model_with_different_blocks() -> None:
    arch = architecture().with_blocks((BlockSizes(3, 3, 64), BlockSizes(3, 2, 64)))
    with pytest.raises(BadInputError, match="differ already"):
        plan(0.2, arch, layout="uniform", allocation="uniform")


def test_a_pruned_model_can_be_planned_again() -> None:
    once = plan(0.3)
    again = plan(0.2, architecture().with_blocks(once.blocks))
    assert_legal(again)
    assert abs(again.ratio - 0.2) <= TOLERANCE


def test_structures_are_all_of_them() -> None:
    found = {(s.kv_groups, s.heads_per_group) for s in head_structures(architecture(), BlockSizes(3, 2, 7))}
    assert found == {(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)}


def test_unknown_allocation_gives_the_nearest_name() -> None:
    with pytest.raises(BadInputError, match="Did you mean 'incremental'"):
        plan(0.2, allocation="incrementel")


def test_what_a_plain_config_cannot_say_is_said_by_the_plan() -> None:
    dense = architecture(hidden=640, sizes=BlockSizes(5, 2, 1536))
    made = make_plan(dense, ratio=0.4, criterion="slimgpt", allocation="uniform", layout="uniform")
    assert 640 % made.blocks[0].query_heads == 0
    assert any("a plain llama config cannot say" in note for note in made.notes)


def test_heads_that_cannot_go_stay_and_the_plan_says_why() -> None:
    for layout in ("per_layer", "uniform"):
        dense = architecture("olmo2")
        made = make_plan(dense, ratio=0.3, criterion="slimgpt", allocation="uniform", layout=layout)
        assert {(b.kv_groups, b.heads_per_group) for b in made.blocks} == {(3, 3)}
        assert any("all heads stay: olmo2" in note for note in made.notes)
    with pytest.raises(BadInputError, match="most that can be removed"):
        make_plan(dense, ratio=0.9, criterion="slimgpt", allocation="uniform", layout="per_layer")


def test_a_family_without_head_dim_in_its_config_loses_channels_alone_in_a_plain_one() -> None:
    dense = architecture("gpt_neox", sizes=BlockSizes(9, 1, 1536))
    made = make_plan(dense, ratio=0.3, criterion="slimgpt", allocation="uniform", layout="uniform")
    assert made.blocks[0].query_heads == 9
    assert abs(made.ratio - 0.3) <= TOLERANCE
    with pytest.raises(BadInputError, match=r"with layout uniform, in which a gpt_neox model keeps its heads"):
        make_plan(dense, ratio=0.9, criterion="slimgpt", allocation="uniform", layout="uniform")
