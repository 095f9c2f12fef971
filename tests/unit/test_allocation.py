"""How the ratio is spread over the blocks: rising ratios, given sizes, and sizes from measured costs."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from slimexport.architectures import registry as families
from slimexport.architectures.base import Architecture
from slimexport.artifacts import (
    BlockCosts,
    BlockSizes,
    ChannelCost,
    CostTable,
    HeadCost,
    PruningPlan,
    to_dict,
    write_json,
)
from slimexport.config import RunConfig
from slimexport.errors import BadInputError
from slimexport.pruning.allocation import TOLERANCE, Request, needs_costs
from slimexport.pruning.allocation import registry as allocations
from slimexport.pruning.planner import make_plan, ratio_of
from slimexport.pruning.stage import cost_identity
from slimexport.stages.plan import known_costs, plan_stage


def architecture(
    blocks: int = 6, sizes: BlockSizes = BlockSizes(3, 2, 96), family: str = "qwen3", hidden: int = 96
) -> Architecture:
    return Architecture(families.get(family), hidden, 16, 211, True, (sizes,) * blocks, frozenset())


def plan(arch: Architecture, ratio: float | None, allocation: str, **options: Any) -> PruningPlan:
    defaults = {"criterion": "slimgpt", "layout": "per_layer", "round_to": 16}
    return make_plan(arch, ratio=ratio, allocation=allocation, **{**defaults, **options})


# --------------------------------------------------------------------------------------------------- rising ratios


@pytest.mark.parametrize("first", [None, 0.0, 0.1, 0.3])
@pytest.mark.parametrize("name", ["arithmetic", "incremental"])
def test_rising_ratios_start_where_asked_and_mean_the_ratio(name: str, first: float | None) -> None:
    wanted = list(allocations.get(name)(Request(architecture(12), 0.3, first_ratio=first)))
    assert wanted[0] == pytest.approx(0.25 * 0.3 if first is None else first)  # type: ignore[arg-type]
    assert sum(wanted) / 12 == pytest.approx(0.3)  # type: ignore[arg-type]
    assert wanted == sorted(wanted)  # type: ignore[type-var]


def test_an_arithmetic_progression_rises_by_equal_steps() -> None:
    wanted = list(allocations.get("arithmetic")(Request(architecture(9), 0.4, first_ratio=0.2)))
    steps = [b - a for a, b in itertools.pairwise(wanted)]  # type: ignore[operator]
    assert steps == pytest.approx([0.05] * 8)


@pytest.mark.parametrize("name", ["arithmetic", "incremental", "uniform"])
def test_a_single_block_loses_the_ratio(name: str) -> None:
    assert list(allocations.get(name)(Request(architecture(1), 0.3, first_ratio=0.1))) == [0.3]


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_arithmetic_plans_hit_the_ratio(ratio: float) -> None:
    made = plan(architecture(12, BlockSizes(3, 2, 960)), ratio, "arithmetic")
    assert abs(made.ratio - ratio) <= TOLERANCE
    assert made.blocks[0].channels > made.blocks[-1].channels


# ------------------------------------------------------------------------------------------------------ given sizes

A, B = BlockSizes(3, 2, 64), BlockSizes(2, 1, 48)


def given(tmp_path: Path, text: str, ratio: float | None = None, **options: Any) -> tuple[BlockSizes, ...]:
    path = tmp_path / "sizes.yaml"
    path.write_text(text, encoding="utf-8")
    return plan(options.pop("arch", architecture()), ratio, "explicit", table=path, **options).blocks


def row(sizes: BlockSizes) -> str:
    return json.dumps(dataclasses.asdict(sizes))


def test_a_table_with_ranges_and_a_star(tmp_path: Path) -> None:
    text = f'0: {row(B)}\n2-4: {row(A)}\n"*": {{kv_groups: 1, heads_per_group: 1, channels: 16}}\n'
    rest = BlockSizes(1, 1, 16)
    assert given(tmp_path, text) == (B, rest, A, A, A, rest)
    assert given(tmp_path, f"'*': {row(A)}") == (A,) * 6
    assert given(tmp_path, f"'0 - 5': {row(A)}") == (A,) * 6


def test_json_a_list_and_a_plan_of_an_earlier_run(tmp_path: Path) -> None:
    assert given(tmp_path, f'{{"0-2": {row(A)}, "3-5": {row(B)}}}') == (A, A, A, B, B, B)
    assert given(tmp_path, f"[{', '.join([row(A), row(B)] * 3)}]") == (A, B) * 3
    made = plan(architecture(), 0.3, "incremental")
    write_json(tmp_path / "plan.json", to_dict(made))
    again = plan(architecture(), None, "explicit", table=tmp_path / "plan.json")
    assert again.blocks == made.blocks
    assert again.ratio == again.ratio_asked == made.ratio
    assert plan(architecture(), 0.3, "explicit", table=tmp_path / "plan.json").blocks == made.blocks


def test_dense_channels_need_be_no_multiple(tmp_path: Path) -> None:
    arch = architecture(2, BlockSizes(3, 2, 90))
    text = "'*': {kv_groups: 3, heads_per_group: 1, channels: 90}"
    assert given(tmp_path, text, arch=arch) == (BlockSizes(3, 1, 90),) * 2
    odd = text.replace("90", "37")
    with pytest.raises(BadInputError, match=r"block 0: channels 37 is no multiple of 16 \(--round-to 1 allows"):
        given(tmp_path, odd, arch=arch)
    assert given(tmp_path, odd, arch=arch, round_to=1) == (BlockSizes(3, 1, 37),) * 2


FULL = "{kv_groups: 3, heads_per_group: 2, channels: 96}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"0-4: {FULL}", r"block 5 is missing \(the model has blocks 0 to 5\)"),
        (f"1-5: {FULL}", "block 0 is missing"),
        (f"0-6: {FULL}", "blocks 0-6 are not among the model's blocks 0 to 5"),
        (f"5-2: {FULL}", "blocks 5-2 are not among"),
        (f"0-5: {FULL}\n3: {FULL}", "block 3 is named twice"),
        (f"'*': {FULL}\n3: {FULL}\n3: {FULL}", "is not valid YAML: '3' is given twice"),
        (f"first: {FULL}", "'first' is neither a block, nor a range such as 1-29"),
        (f"-1: {FULL}", "'?-1'? is neither a block"),
        (f"'*': {FULL.replace('channels', 'chanels')}", r"unknown field 'chanels'\. Did you mean 'channels'"),
        ("'*': {kv_groups: 3, channels: 96}", "heads_per_group is missing"),
        ("'*': 96", "expected kv_groups, heads_per_group, channels, found 96"),
        (f"'*': {FULL.replace('96', '96.0')}", r"channels must be a whole number, not 96\.0"),
        (f"'*': {FULL.replace('3', 'true')}", "kv_groups must be a whole number, not True"),
        (f"'*': {FULL.replace('3', '4')}", "block 0: kv_groups 4 is not between 1 and 3"),
        (f"'*': {FULL.replace('2', '0')}", "heads_per_group 0 is not between 1 and 2"),
        (f"'*': {FULL.replace('96', '112')}", "channels 112 is not between 1 and 96"),
        (f"0-4: {FULL}\n5: {FULL.replace('96', '-16')}", "block 5: channels -16 is not between"),
        ("", "expected a table of blocks, found a NoneType"),
        ("just words", "expected a table of blocks, found a str"),
        ("0: [", "is not valid YAML"),
        (f"*: {FULL}", "line 1 is not valid YAML"),
        (f"[{FULL}, {FULL}]", "block 2 is missing"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(BadInputError, match=expected) as caught:
        given(tmp_path, text)
    assert "sizes.yaml" in str(caught.value)


def test_a_table_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"allocation explicit needs a table of sizes: --sizes FILE"):
        plan(architecture(), None, "explicit")
    with pytest.raises(BadInputError, match=r"none\.yaml cannot be read: No such file"):
        plan(architecture(), None, "explicit", table=tmp_path / "none.yaml")
    with pytest.raises(BadInputError, match="cannot be read: Is a directory"):
        plan(architecture(), None, "explicit", table=tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInputError, match="not UTF-8"):
        plan(architecture(), None, "explicit", table=tmp_path / "binary")


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5])
def test_a_table_that_does_not_remove_the_ratio_that_was_asked_for(tmp_path: Path, ratio: float) -> None:
    with pytest.raises(BadInputError, match=rf"The given sizes remove 0\.\d+ of .*, not {ratio:g}: leave out --ratio"):
        given(tmp_path, f"'*': {row(A)}", ratio)
    assert given(tmp_path, f"'*': {row(A)}", ratio_of(architecture(), [A] * 6) + 0.004)


def test_given_sizes_in_a_uniform_layout(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="blocks of 2 different sizes: use --layout per_layer"):
        given(tmp_path, f"0: {row(A)}\n'*': {row(B)}", layout="uniform")
    assert given(tmp_path, f"'*': {row(A)}", layout="uniform") == (A,) * 6
    llama = architecture(family="llama", sizes=BlockSizes(5, 1, 96), hidden=80)
    text = "'*': {kv_groups: 3, heads_per_group: 1, channels: 96}"
    with pytest.raises(BadInputError, match="llama refuses 3 query heads"):
        given(tmp_path, text, layout="uniform", arch=llama)
    assert given(tmp_path, text, arch=llama)


def test_given_sizes_by_config(tmp_path: Path) -> None:
    """Without --ratio the table decides; with it, the two must agree."""
    path = tmp_path / "sizes.yaml"
    path.write_text(f"'*': {row(A)}")
    made = plan_stage(RunConfig(model="m", sizes=path), architecture(), "float32")
    assert made.allocation == "explicit"
    assert made.blocks == (A,) * 6
    with pytest.raises(BadInputError, match=r"not 0\.25"):
        plan_stage(RunConfig(model="m", sizes=path, ratio=0.25), architecture(), "float32")


# --------------------------------------------------------------------------------------------------- measured costs


def cost_table(
    arch: Architecture, round_to: int = 16, seed: int = 0, identity: Mapping[str, str] | None = None
) -> CostTable:
    """Every block with its own prices, in no simple order."""
    blocks = []
    for i, dense in enumerate(arch.blocks):
        scale = 0.01 * (1 + (7 * i + seed) % 5)
        heads = tuple(
            HeadCost(g, h, scale * (dense.query_heads - g * h) ** 1.5 * (1.3 if h < g else 1.0))
            for g in range(1, dense.kv_groups + 1) for h in range(1, dense.heads_per_group + 1)
        )  # fmt: skip
        counts = [dense.channels, *range((dense.channels - 1) // round_to * round_to, 0, -round_to)]
        channels = tuple(ChannelCost(c, 0.3 / scale * 1e-4 * (dense.channels - c) ** (1.2 + 0.2 * i)) for c in counts)
        blocks.append(BlockCosts(heads, channels))
    return CostTable(identity or {}, 64, tuple(blocks), 1.0)


def every_size(costs: BlockCosts) -> list[tuple[BlockSizes, float]]:
    return [
        (BlockSizes(h.kv_groups, h.heads_per_group, c.channels), h.cost + c.cost)
        for h in costs.heads for c in costs.channels
    ]  # fmt: skip


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_sensitivity_gives_the_cheapest_plan_there_is(seed: int, ratio: float) -> None:
    arch = architecture(3, BlockSizes(2, 2, 64))
    table = cost_table(arch, seed=seed)
    made = plan(arch, ratio, "sensitivity", costs=table)
    plans = [
        (abs(ratio_of(arch, [s for s, _ in chosen]) - ratio), sum(c for _, c in chosen))
        for chosen in itertools.product(*map(every_size, table.blocks))
    ]
    nearest = min(miss for miss, _ in plans)
    best = min(cost for miss, cost in plans if miss <= nearest + 1e-9)
    prices = [dict(every_size(costs)) for costs in table.blocks]
    assert abs(made.ratio - ratio) == pytest.approx(nearest, abs=1e-9)
    assert sum(p[b] for p, b in zip(prices, made.blocks, strict=True)) == pytest.approx(best)
    assert made.allocation == "sensitivity"


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4, 0.6])
def test_sensitivity_in_a_uniform_layout_gives_the_cheapest_size(ratio: float) -> None:
    arch = architecture(3, BlockSizes(3, 2, 960))
    table = cost_table(arch)
    made = plan(arch, ratio, "sensitivity", layout="uniform", costs=table)
    assert len(set(made.blocks)) == 1
    prices = [dict(every_size(costs)) for costs in table.blocks]
    near = [s for s in prices[0] if abs(ratio_of(arch, [s] * 3) - ratio) <= TOLERANCE]
    assert near
    assert made.blocks[0] == min(near, key=lambda s: sum(p[s] for p in prices))
    assert abs(made.ratio - ratio) <= TOLERANCE


def test_a_uniform_layout_where_no_size_is_near_takes_the_nearest_and_says_so() -> None:
    arch = architecture(2, BlockSizes(2, 1, 32))
    made = plan(arch, 0.3, "sensitivity", layout="uniform", costs=cost_table(arch))
    sizes = {s for s, _ in every_size(cost_table(arch).blocks[0])}
    assert made.blocks[0] == min(sizes, key=lambda s: abs(ratio_of(arch, [s] * 2) - 0.3))
    assert any("instead of 0.3" in note for note in made.notes)


def test_a_uniform_layout_has_only_what_a_plain_config_can_say() -> None:
    arch = architecture(2, BlockSizes(6, 1, 960), "llama")
    free = plan(dataclasses.replace(arch, family=families.get("qwen3")), 0.3, "sensitivity", layout="uniform",
                costs=_cheap_heads(arch, 5))  # fmt: skip
    assert free.blocks[0].query_heads == 5
    bound = plan(arch, 0.3, "sensitivity", layout="uniform", costs=_cheap_heads(arch, 5))
    assert arch.hidden % bound.blocks[0].query_heads == 0


def _cheap_heads(arch: Architecture, cheap: int) -> CostTable:
    table = cost_table(arch)
    return dataclasses.replace(table, blocks=tuple(
        BlockCosts(tuple(dataclasses.replace(h, cost=float(h.kv_groups != cheap)) for h in b.heads),
                   tuple(dataclasses.replace(c, cost=0.0) for c in b.channels))
        for b in table.blocks
    ))  # fmt: skip


def test_sensitivity_without_costs() -> None:
    assert needs_costs(allocations.get("sensitivity"))
    assert not needs_costs(allocations.get("incremental"))
    with pytest.raises(BadInputError, match="needs measured costs"):
        plan(architecture(), 0.3, "sensitivity")
    shown = plan_stage(RunConfig(model="m", allocation="sensitivity"), architecture(), "float32")
    assert shown.allocation == "incremental"


@pytest.mark.parametrize(
    "change", ["model", "text", "seed", "damping", "round_to", "probe_tokens", "dtype", "slimexport"]
)
def test_costs_of_something_else_are_refused(tmp_path: Path, change: str) -> None:
    identity = cost_identity("abc", RunConfig(model="m"), "def")
    assert change in identity
    path = tmp_path / "costs.json"
    table = cost_table(architecture(), identity=identity)
    write_json(path, to_dict(table))
    assert known_costs(path, identity) == table
    assert known_costs(path, cost_identity("abc", RunConfig(model="m"), None)) == table  # before the text is read
    with pytest.raises(BadInputError, match=rf"costs\.json: .* with {change} = '.*', this run has 'other'"):
        known_costs(path, {**identity, change: "other"})


def test_costs_that_are_not_there_or_not_whole(tmp_path: Path) -> None:
    assert known_costs(None, {}) is None
    assert known_costs(tmp_path / "none.json", {}) is None
    (tmp_path / "half.json").write_text('{"identity": {')
    with pytest.raises(BadInputError, match="may be truncated"):
        known_costs(tmp_path / "half.json", {})
    (tmp_path / "other.json").write_text('{"schema_version": 1, "blocks": []}')
    with pytest.raises(BadInputError, match="not a valid CostTable"):
        known_costs(tmp_path / "other.json", {})
