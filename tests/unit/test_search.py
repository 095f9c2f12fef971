"""The supernet against whole masked models, and the search on it and on landscapes made by hand."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_directory, tiny_model, tiny_text
from test_allocation import architecture, cost_table, plan
from test_engine import calibration, config, loaded
from test_sensitivity import CHANNELS, HEADS, candidates, direct_kl, measured, tokens

from slimexport import pipeline
from slimexport.architectures import architecture_of
from slimexport.artifacts import BlockSizes, PruningPlan, from_dict, read_json
from slimexport.config import RunConfig, make_config
from slimexport.errors import BadInputError, UsageError
from slimexport.pruning import grid
from slimexport.pruning.allocation import TOLERANCE, SearchSettings, needs_costs, searches
from slimexport.pruning.allocation import registry as allocations
from slimexport.pruning.blocks import ModelBlocks
from slimexport.pruning.forward import Settings, first_states
from slimexport.pruning.grid import Grid
from slimexport.pruning.planner import ratio_of
from slimexport.pruning.probe import output_logits
from slimexport.pruning.stage import cost_identity, measure_model, search_settings
from slimexport.pruning.supernet import Supernet, SupernetWriter, read_grids
from slimexport.stages import prune as stage
from slimexport.stages.plan import plan_stage

# -------------------------------------------------------------------------------------------------------- supernet


def assembled(model: Any, sizes: tuple[BlockSizes, ...], made: list[dict[Any, torch.Tensor]]) -> Any:
    masked = copy.deepcopy(model)
    for index, (block, kept) in enumerate(zip(masked.model.layers, sizes, strict=True)):
        block.get_submodule(HEADS).weight.data = made[index][HEADS, (kept.kv_groups, kept.heads_per_group)]
        block.get_submodule(CHANNELS).weight.data = made[index][CHANNELS, kept.channels]
    return masked


def some_plans(grids: Sequence[Grid], count: int, seed: int) -> list[tuple[BlockSizes, ...]]:
    rng = random.Random(seed)
    return [tuple(BlockSizes(*rng.choice(g.heads), rng.choice(g.channels)) for g in grids) for _ in range(count)]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_plan_is_worth_the_kl_of_the_whole_masked_model(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, dtype=torch.float64)
    known, probed = tokens(6, 24, seed=1), tokens(3, 24, seed=2)
    writer = SupernetWriter(tmp_path / "net", torch.float64)
    with_net = measured(model, known, probed, keep=writer)
    assert read_grids(tmp_path / "net", {"model": "tiny"}) is None  # half a supernet is none
    writer.finish({"model": "tiny"})
    grids = read_grids(tmp_path / "net", {"model": "tiny"})
    assert grids is not None
    assert read_grids(tmp_path / "net", {"model": "other"}) is None
    assert with_net.blocks == measured(model, known, probed).blocks  # the costs are those of a pass without one

    arch, before = architecture_of(model.config, "tiny"), copy.deepcopy(model.state_dict())
    settings = Settings(torch.device("cpu"), torch.float64, 8, 1, 0.01)
    states, arguments = first_states(model, arch, probed, settings, whole=True)
    net = Supernet(
        tmp_path / "net", source=ModelBlocks(model, arch), probes=states[0], arguments=lambda i: arguments(i, 0),
        logits=output_logits(model, arch, settings.device), architecture=arch, settings=settings,
    )  # fmt: skip
    made = [{(name, size): W for name, size, W in candidates(model, known, i)} for i in range(3)]
    plans = some_plans(grids, 5, seed=0)
    plans += [(*plans[0][:2], plans[1][2]), plans[0]]  # begins like another; is another
    scores = net.evaluate(plans)
    for sizes, score in zip(plans, scores, strict=True):
        assert score == pytest.approx(direct_kl(model, assembled(model, sizes, made), probed), rel=1e-3)
    assert scores == [net.evaluate([sizes])[0] for sizes in plans]
    assert net.evaluate([arch.blocks]) == [0.0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_is_kept_of_a_block() -> None:
    few = {(g, h): 9.0 - g * h for g in (1, 2, 3) for h in (1, 2, 3)}
    shares = {size: float(size[0] * (2 * size[1] + 2)) for size in few}
    assert set(grid.searched_heads(few, shares)) == set(few)
    # Of many, those that no smaller one beats: here one heads_per_group is always better than the others.
    many = {(g, h): (64.0 - g * h) * (1 if h == 4 else 3) for g in range(1, 9) for h in range(1, 9)}
    many[8, 8] = 0.0
    shares = {size: float(size[0] * (2 * size[1] + 2)) for size in many}
    kept = grid.searched_heads(many, shares)
    assert (1, 1) in kept
    assert (8, 8) in kept
    assert len(kept) <= grid.SEARCHED_HEADS
    for size in kept[1:-1]:
        assert not any(many[o] <= many[size] and shares[o] <= shares[size] for o in many if o != size)
    counts = list(range(1536, 0, -32))
    chosen = grid.searched_channels(counts)
    assert len(chosen) == 12
    assert (chosen[0], chosen[-1]) == (1536, 32)
    assert grid.searched_channels([64, 32]) == [64, 32]


# ---------------------------------------------------------------------------------------------------------- search

ARCH = architecture(5, BlockSizes(3, 2, 192))
TABLE = cost_table(ARCH)
GRIDS = (Grid(tuple(ARCH.legal_heads(ARCH.blocks[0])), tuple(range(192, 0, -32))),) * 5


class Landscape:
    """A KL that added costs do not know: neighbouring blocks cut together cost more. Counts what is asked of it."""

    def __init__(self, most: float = math.inf) -> None:
        self.asked: list[tuple[BlockSizes, ...]] = []
        self._most = most

    def __call__(self, plans: Sequence[tuple[BlockSizes, ...]]) -> list[float]:
        if len(self.asked) >= self._most:
            raise KeyboardInterrupt
        self.asked += plans
        return [self.kl(sizes) for sizes in plans]

    @staticmethod
    def kl(sizes: tuple[BlockSizes, ...]) -> float:
        kept = [1 - ratio_of(ARCH.with_blocks((d,)), [s]) for d, s in zip(ARCH.blocks, sizes, strict=True)]
        alone = sum((1 + i) * (1 - share) ** 2 for i, share in enumerate(kept))
        return alone + sum(4 * (1 - a) * (1 - b) for a, b in itertools.pairwise(kept))


def searching(evaluate: Callable[..., list[float]], **changes: Any) -> SearchSettings:
    defaults = {"grids": GRIDS, "seed": 0, "seconds": 1e9, "evaluations": 40, "identity": {"model": "a", "ratio": 0.3}}
    return SearchSettings(evaluate, **{**defaults, **changes})


def found(search: SearchSettings, ratio: float = 0.3) -> PruningPlan:
    return plan(ARCH, ratio, "search", costs=TABLE, search=search)


def test_a_search_ends_better_than_it_starts_and_on_the_ratio() -> None:
    landscape, shown = Landscape(), []
    made = found(searching(landscape, progress=lambda *update: shown.append(update)))
    asked = landscape.asked
    assert len(asked) == len(set(asked)) == 40
    scores = [landscape.kl(sizes) for sizes in asked]
    assert landscape.kl(made.blocks) == min(scores) < 0.99 * scores[0]
    for sizes in asked:
        assert abs(ratio_of(ARCH, sizes) - 0.3) <= TOLERANCE
        assert all(b.channels in g.channels for b, g in zip(sizes, GRIDS, strict=True))
    assert made.allocation == "search"
    assert made.notes[0] == (
        f"search: KL {scores[0]:.4f} of the plan by added costs, {min(scores):.4f} of the best of 40 plans tried"
    )
    assert [done for done, _, _ in shown] == [1, *range(5, 38, 4), 40]
    assert shown[-1] == (40, 40, f"best KL {min(scores):.4f} (start {scores[0]:.4f})")


def test_it_starts_from_the_cheapest_plan_on_the_grid() -> None:
    landscape = Landscape()
    made = found(searching(landscape, evaluations=1))
    assert landscape.asked == [made.blocks]
    coarse = dataclasses.replace(TABLE, blocks=tuple(
        dataclasses.replace(b, channels=tuple(c for c in b.channels if c.channels in GRIDS[0].channels))
        for b in TABLE.blocks
    ))  # fmt: skip
    assert made.blocks == plan(ARCH, 0.3, "sensitivity", costs=coarse).blocks


@pytest.mark.parametrize("seed", range(4))
def test_it_never_ends_worse_than_it_starts(seed: int) -> None:
    """Where no plan is better than the start, that is what comes out; else the best there was."""
    start = found(searching(Landscape(), evaluations=1)).blocks
    assert found(searching(lambda plans: [0.5 + (sizes != start) for sizes in plans], seed=seed)).blocks == start
    rng, noise = random.Random(seed), {}
    made = found(searching(lambda plans: [noise.setdefault(sizes, rng.random()) for sizes in plans], seed=seed))
    assert noise[made.blocks] == min(noise.values())


def test_the_seed_decides() -> None:
    one, two, other = Landscape(), Landscape(), Landscape()
    a, b = found(searching(one, seed=3)), found(searching(two, seed=3))
    found(searching(other, seed=4))
    assert one.asked == two.asked
    assert a == b
    assert one.asked[0] == other.asked[0]
    assert one.asked != other.asked


@pytest.mark.parametrize("most", [1, 2, 9, 33])
def test_a_killed_search_goes_on_to_the_same_result(tmp_path: Path, most: int) -> None:
    whole, dying, rest = Landscape(), Landscape(most), Landscape()
    expected = found(searching(whole))
    state = tmp_path / "work" / "search.json"
    with pytest.raises(KeyboardInterrupt):
        found(searching(dying, state=state))
    assert found(searching(rest, state=state)) == expected
    assert dying.asked + rest.asked == whole.asked
    finished = Landscape()
    assert found(searching(finished, state=state)) == expected  # nothing is left to be tried
    assert finished.asked == []


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "search.json"
    found(searching(Landscape(), state=state, evaluations=5))
    with pytest.raises(BadInputError, match=r"search\.json: the interrupted run had model = 'a', this one has 'b'"):
        found(searching(Landscape(), state=state, identity={"model": "b", "ratio": 0.3}))
    state.write_text(state.read_text()[:-20])
    with pytest.raises(BadInputError, match="may be truncated"):
        found(searching(Landscape(), state=state))


def test_the_time_is_kept_over_interruptions(tmp_path: Path) -> None:
    state = tmp_path / "search.json"
    landscape = Landscape()
    found(searching(landscape, state=state, seconds=1e-9))
    assert len(landscape.asked) == 1  # the start is always tried
    data = json.loads(state.read_text())
    assert data["seconds"] > 1e-9
    state.write_text(json.dumps(data | {"seconds": 50.0}))
    found(searching(landscape, state=state, seconds=49.0))
    assert len(landscape.asked) == 1
    found(searching(landscape, state=state, seconds=1e6, evaluations=7))
    assert len(landscape.asked) == 7


def test_it_ends_where_no_new_plan_is_left() -> None:
    few = (Grid(((3, 2), (2, 2)), (192, 96)),) * 5
    landscape = Landscape()
    found(searching(landscape, grids=few, evaluations=100_000), ratio=0.2)
    assert 1 < len(landscape.asked) < 1000
    assert len(set(landscape.asked)) == len(landscape.asked)


def test_what_a_search_needs() -> None:
    search = allocations.get("search")
    assert needs_costs(search)
    assert searches(search)
    assert not searches(allocations.get("sensitivity"))
    with pytest.raises(BadInputError, match="allocation search tries plans on the model"):
        plan(ARCH, 0.3, "search", costs=TABLE)
    shown = plan_stage(RunConfig(model="m", allocation="search", round_to=16), ARCH, "float32", TABLE)
    assert shown.allocation == "sensitivity"
    assert plan_stage(RunConfig(model="m", allocation="search"), ARCH, "float32").allocation == "incremental"


@pytest.mark.parametrize(("name", "value"), [("search_seconds", 0), ("search_seconds", -1), ("search_evaluations", 0)])
def test_no_budget_is_wrong_usage(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}: Input should be greater") as caught:
        make_config({"model": "m", name: value}, "options", {name})
    assert caught.value.exit_code == 2
    with pytest.raises(BadInputError, match="allocation 'search' cannot differ"):
        make_config({"model": "m", "allocation": "search", "layout": "uniform"})


# ------------------------------------------------------------------------------------------------- on a tiny model


def test_a_search_on_a_model(tmp_path: Path) -> None:
    model, text = tiny_model("qwen2", intermediate_size=160), calibration()
    settings = config(probe_tokens=64, search_evaluations=9, ratio=0.3, round_to=16)
    before = copy.deepcopy(model.state_dict())
    table = measure_model(loaded(model), text, settings, supernet=tmp_path / "net")
    search = search_settings(loaded(model), text, settings, supernet=tmp_path / "net")
    made = plan(architecture_of(model.config, "tiny"), 0.3, "search", costs=table, search=search)
    start = plan(architecture_of(model.config, "tiny"), 0.3, "search", costs=table,
                 search=dataclasses.replace(search, evaluations=1))  # fmt: skip
    best, first = search.evaluate([made.blocks, start.blocks])
    assert 0 < best <= first
    assert f"{first:.4f} of the plan by added costs, {best:.4f} of the best of 9 plans" in made.notes[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert table.identity == cost_identity("f", settings, text.source.sha256)
    with pytest.raises(BadInputError, match="holds no supernet of this model, text and settings"):
        search_settings(loaded(model), text, config(probe_tokens=32, round_to=16), supernet=tmp_path / "net")


def test_blocks_that_have_nothing_to_choose(tmp_path: Path) -> None:
    model = tiny_model("qwen2", num_attention_heads=1, num_key_value_heads=1, intermediate_size=16)
    settings = config(probe_tokens=64, round_to=16)
    measure_model(loaded(model), calibration(), settings, supernet=tmp_path)
    search = search_settings(loaded(model), calibration(), settings, supernet=tmp_path)
    assert search.grids == (Grid(((1, 1),), (16,)),) * 3
    assert search.evaluate([(BlockSizes(1, 1, 16),) * 3]) == [0.0]


def test_a_run_that_is_killed_while_it_searches_and_while_it_prunes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RunConfig(
        model=str(tiny_directory(tmp_path / "model", "qwen3")), calibration=str(tiny_text(tmp_path / "a.txt", 700, 0)),
        calibration_tokens=512, sequence_length=32, probe_tokens=64, allocation="search", search_evaluations=13,
        ratio=0.3, round_to=16, device="cpu",
    )  # fmt: skip
    monkeypatch.setattr(stage, "_shrink", _stop)  # after the last block, before its work is thrown away
    with pytest.raises(_Stop):
        pipeline.prune(options, tmp_path / "whole")
    whole = from_dict(PruningPlan, read_json(tmp_path / "whole" / "plan.json"), "plan.json")
    assert whole.allocation == "search"
    assert "of the best of 13 plans tried" in whole.notes[0]

    evaluate, calls = Supernet.evaluate, [0]

    def dying(self: Supernet, plans: Any) -> list[float]:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return evaluate(self, plans)

    out = tmp_path / "killed"
    monkeypatch.setattr(Supernet, "evaluate", dying)
    with pytest.raises(KeyboardInterrupt):
        pipeline.prune(options, out)
    assert (out / ".work" / "search.json").is_file()
    monkeypatch.setattr(Supernet, "evaluate", evaluate)
    monkeypatch.setattr("slimexport.pruning.stage.measure_costs", _refuse)  # costs and supernet are there
    with pytest.raises(_Stop):
        pipeline.prune(options, out, resume=True)
    assert read_json(out / "plan.json") == read_json(tmp_path / "whole" / "plan.json")
    assert (out / ".work" / "002.json").is_file()
    monkeypatch.setattr(Supernet, "evaluate", _refuse)  # the search is over
    with pytest.raises(_Stop):
        pipeline.prune(options, out, resume=True)


class _Stop(Exception):
    pass


def _stop(*_: Any) -> None:
    raise _Stop


def _refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("not to be called again")
