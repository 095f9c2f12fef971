"""The plan of the best model that a search finds by trying whole plans: what several cuts cost together is not the sum
of what each costs alone.

A (1 + lambda) evolution, as EvoPress (arXiv 2410.14649) does with compression levels, judged by the KL to the dense
model, over the candidates of a supernet, as in Týr-the-Pruner (arXiv 2503.09657) and OptiShear. What evolves are
multipliers on the measured costs, by which the cheapest plan is then solved for: every proposal is legal, removes the
ratio, and moves parameters between blocks, and between heads and channels, where the costs say it is nearly free.

With the budget in evaluations the result follows from the seed. With the budget in seconds it depends on the machine's
speed: whichever ends first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from slimexport.artifacts import BlockSizes, check_identity, read_json, write_json
from slimexport.errors import BadInputError
from slimexport.pruning.allocation import Request, SearchSettings, registry
from slimexport.pruning.allocation.sensitivity import assembled, block_parts
from slimexport.pruning.solver import Option, cheapest

CHILDREN = 4  # per generation: they pass through the model together
CHANGED = 4  # multipliers that a child may have different from its parent, at most
STEP = (0.2, 0.7, 2.0)  # standard deviation of a change, log: least, first, most
TRIES = 16  # proposals per child until one is new
FARTHEST = 8.0  # of a log multiplier from zero

Plan = tuple[BlockSizes, ...]
Parts = list[list[Option[BlockSizes]]]


@dataclass
class State:
    """What a search goes on from. The best plan's log multipliers are the parent of the next generation."""

    plan: Plan
    kl: float
    start: float  # KL of the plan that the search starts from
    multipliers: list[float]
    rng: dict[str, Any]  # of numpy's PCG64
    step: float = STEP[1]
    seconds: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)  # every plan that was tried -> KL

    def save(self, settings: SearchSettings) -> None:
        if settings.state is not None:
            write_json(settings.state, {"identity": dict(settings.identity), **asdict(self)})

    @classmethod
    def read(cls, settings: SearchSettings) -> State | None:
        """None where no search was begun; BadInputError where it was one for something else."""
        if settings.state is None or not settings.state.is_file():
            return None
        data = read_json(settings.state)
        check_identity(data.pop("identity"), settings.identity, settings.state)
        plan = tuple(BlockSizes(**sizes) for sizes in data.pop("plan"))
        return cls(plan=plan, **data)


class Search:
    needs_costs = True
    searches = True

    def __call__(self, request: Request) -> Plan:
        settings = request.search
        if request.costs is None or settings is None:
            raise BadInputError("allocation search tries plans on the model: prune it to have one searched for.")
        wanted = request.wanted_parameters
        parts = _searched_parts(request)
        clock = time.monotonic()
        state = State.read(settings) or _begin(parts, wanted, settings)
        before = state.seconds
        while True:
            state.seconds = before + time.monotonic() - clock
            state.save(settings)
            done = len(state.scores)
            settings.progress(done, settings.evaluations, f"best KL {state.kl:.4f} (start {state.start:.4f})")
            if done >= settings.evaluations or state.seconds >= settings.seconds:
                break
            if not _generation(state, parts, wanted, settings):
                break
        request.note(
            f"search: KL {state.start:.4f} of the plan by added costs, {state.kl:.4f} of the best of "
            f"{len(state.scores)} plans tried"
        )
        return state.plan


def _searched_parts(request: Request) -> Parts:
    """The parts of every block with those of their sizes that the supernet holds."""
    assert request.search is not None
    parts = block_parts(request)
    for i, grid in enumerate(request.search.grids):
        parts[2 * i] = [o for o in parts[2 * i] if (o.choice.kv_groups, o.choice.heads_per_group) in grid.heads]
        parts[2 * i + 1] = [o for o in parts[2 * i + 1] if o.choice.channels in grid.channels]
    return parts


def _solve(parts: Parts, multipliers: Sequence[float], wanted: int) -> Plan:
    priced = [
        [replace(option, cost=option.cost * math.exp(log)) for option in options]
        for options, log in zip(parts, multipliers, strict=True)
    ]
    return assembled([option.choice for option in cheapest(priced, wanted)])


def _begin(parts: Parts, wanted: int, settings: SearchSettings) -> State:
    """The plan by added costs, on the supernet's sizes."""
    multipliers = [0.0] * len(parts)
    plan = _solve(parts, multipliers, wanted)
    (kl,) = settings.evaluate([plan])
    rng: Any = np.random.default_rng(settings.seed).bit_generator.state
    return State(plan, kl, kl, multipliers, rng, scores={_name(plan): kl})


def _generation(state: State, parts: Parts, wanted: int, settings: SearchSettings) -> bool:
    """Tries a few new plans and keeps the best there is; False where none could be found that is new."""
    generator = np.random.default_rng()
    generator.bit_generator.state = state.rng
    count = min(CHILDREN, settings.evaluations - len(state.scores))
    children: dict[Plan, list[float]] = {}
    step = state.step
    for _ in range(TRIES * count):
        multipliers = np.array(state.multipliers)
        changed = generator.choice(len(parts), size=generator.integers(1, min(CHANGED, len(parts)) + 1), replace=False)
        multipliers[changed] += generator.normal(0.0, step, size=len(changed))
        made = multipliers.clip(-FARTHEST, FARTHEST).tolist()
        plan = _solve(parts, made, wanted)
        if _name(plan) in state.scores or plan in children:
            step *= 1.1  # too near to what is known
            continue
        children[plan] = made
        if len(children) == count:
            break
    state.rng = dict(generator.bit_generator.state)
    if not children:
        return False
    scores = settings.evaluate(list(children))
    state.scores |= {_name(plan): kl for plan, kl in zip(children, scores, strict=True)}
    kl, plan = min(zip(scores, children, strict=True), key=lambda pair: pair[0])
    better = kl < state.kl
    if better:
        state.kl, state.plan, state.multipliers = kl, plan, children[plan]
    # Longer steps while they succeed, shorter ones where they do not (Rechenberg's success rule).
    state.step = min(state.step * 1.3, STEP[2]) if better else max(state.step * 0.9, STEP[0])
    return True


def _name(plan: Plan) -> str:
    return " ".join(f"{b.kv_groups}x{b.heads_per_group}x{b.channels}" for b in plan)


registry.register("search")(Search())
