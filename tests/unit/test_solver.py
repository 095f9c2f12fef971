"""The cheapest plan against every plan there is."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimexport.errors import BadInputError
from slimexport.pruning import solver
from slimexport.pruning.solver import Option, cheapest

Parts = list[list[Option[int]]]


def every_plan(parts: Parts, parameters: int) -> tuple[int, float]:
    """How near to `parameters` any plan comes, and the least cost of those that near."""
    plans = [(sum(o.parameters for o in p), sum(o.cost for o in p)) for p in itertools.product(*parts)]
    miss = min(abs(size - parameters) for size, _ in plans)
    return miss, min(cost for size, cost in plans if abs(size - parameters) == miss)


def found(parts: Parts, parameters: int) -> tuple[int, float]:
    picked = cheapest(parts, parameters)
    assert all(option in options for option, options in zip(picked, parts, strict=True))
    return abs(sum(o.parameters for o in picked) - parameters), sum(o.cost for o in picked)


def assert_best(parts: Parts, parameters: int) -> None:
    miss, cost = found(parts, parameters)
    best_miss, best_cost = every_plan(parts, parameters)
    assert miss == best_miss
    assert cost == pytest.approx(best_cost, rel=1e-12, abs=1e-12)


def random_parts(seed: int, *, parts: int, options: int, step: int = 1, most: int = 60) -> Parts:
    rng = random.Random(seed)
    return [
        [Option(step * rng.randint(0, most), rng.choice([0.0, rng.random(), rng.random() * 1e3]), i) for i in range(n)]
        for n in (rng.randint(1, options) for _ in range(parts))
    ]


options = st.builds(Option, st.integers(0, 97), st.floats(-5, 1e6), st.integers(0, 9))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(-50, 500))
def test_the_optimum_of_any_small_grid(parts: Parts, parameters: int) -> None:
    assert_best(parts, parameters)


@pytest.mark.parametrize("step", [1, 7, 36864])
@pytest.mark.parametrize("seed", range(8))
def test_the_optimum_whatever_the_step(seed: int, step: int) -> None:
    parts = random_parts(seed, parts=5, options=4, step=step)
    for share in (0.2, 0.5, 0.8):
        assert_best(parts, round(share * sum(max(o.parameters for o in p) for p in parts)))


def test_sizes_that_have_nothing_in_common() -> None:
    """Heads of 9 and channels of 14 parameters: the unit is one parameter."""
    parts = [[Option(9 * n, 1 / n, n) for n in range(1, 5)], [Option(14 * n + 3, 2 / n, n) for n in range(1, 6)]] * 2
    for parameters in range(0, 220, 11):
        assert_best(parts, parameters)


def test_of_equal_plans_the_first_options_win_every_time() -> None:
    parts = [[Option(1, 0.5, 0), Option(1, 0.5, 1), Option(2, 0.5, 2)]] * 3
    picked = cheapest(parts, 4)
    assert sum(o.parameters for o in picked) == 4
    assert picked == cheapest(parts, 4)
    assert 1 not in [o.choice for o in picked]


def test_of_two_equally_near_sizes_the_cheaper() -> None:
    for cheap in (8, 12):
        parts = [[Option(8, 1.0 + (cheap != 8), 8), Option(12, 1.0 + (cheap != 12), 12)]]
        assert cheapest(parts, 10)[0].choice == cheap


@pytest.mark.parametrize(("parameters", "expected"), [(-100, 3), (0, 3), (10**9, 30), (16, 12), (14, 12), (22, 21)])
def test_a_budget_out_of_reach_gives_the_nearest(parameters: int, expected: int) -> None:
    parts = [[Option(1, 5.0, 0), Option(10, 0.0, 1)], [Option(2, 5.0, 0), Option(20, 0.0, 1)]]
    assert sum(o.parameters for o in cheapest(parts, parameters)) == expected


def test_one_option_each() -> None:
    assert [o.choice for o in cheapest([[Option(3, 1.0, 7)], [Option(5, 1.0, 8)]], 1)] == [7, 8]
    assert cheapest([], 5) == []


@pytest.mark.parametrize("seed", range(6))
def test_a_coarse_unit_stays_near(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact for sizes rounded to the unit, each of which is off by half a unit at most."""
    parts = random_parts(seed, parts=4, options=5, most=4000)
    least = [min(o.parameters for o in p) for p in parts]
    most = sum(max(o.parameters for o in p) for p in parts) - sum(least)
    monkeypatch.setattr(solver, "MOST_UNITS", 64)
    unit = math.ceil(most / 64)
    rounded = [
        [Option(unit * round((o.parameters - low) / unit), o.cost, o.choice) for o in p]
        for p, low in zip(parts, least, strict=True)
    ]
    for share in (0.3, 0.6):
        wanted = round(share * most)
        picked = cheapest(parts, wanted + sum(least))
        _, cost = every_plan(rounded, wanted)
        assert sum(o.cost for o in picked) == pytest.approx(cost, rel=1e-12)
        miss = abs(sum(o.parameters for o in picked) - sum(least) - wanted)
        assert miss <= every_plan(parts, wanted + sum(least))[0] + unit * len(parts)


def test_many_blocks_with_sizes_that_share_no_divisor() -> None:
    """The unit is coarse by itself there; the plan is within a thousandth of what was asked."""
    rng = random.Random(0)
    heads, channels = 8192 * 128 * 2, 8192 * 3 * 32
    parts = [
        [Option(n * size + n % 3, rng.random() / n, n) for n in range(1, 40)]
        for _ in range(20)
        for size in (heads, channels)
    ]
    most = sum(p[-1].parameters for p in parts)
    for share in (0.5, 0.75):
        picked = cheapest(parts, round(share * most))
        assert sum(o.parameters for o in picked) == pytest.approx(share * most, rel=1e-3)


@pytest.mark.parametrize("cost", [math.nan, math.inf, -math.inf])
def test_costs_must_be_numbers(cost: float) -> None:
    with pytest.raises(BadInputError, match="A cost of part 1 of the plan is not a finite number"):
        cheapest([[Option(1, 0.0, 0)], [Option(1, cost, 0), Option(2, 0.0, 0)]], 2)


def test_a_part_without_options() -> None:
    with pytest.raises(BadInputError, match="Part 1 of the plan has no legal size"):
        cheapest([[Option(1, 0.0, 0)], []], 2)
