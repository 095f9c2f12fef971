"""Who is measured when: all models take turns within a round, and every round turns their order round.

They take turns every TURN tokens as well: a machine that others use too is slow now and then for a tenth of a second,
and what was measured within that of each other has the same luck.

TTFT: from the prompt's token ids to the first token on the host, with an empty cache. ITL: time between two output
tokens after that. Greedy, no queue, no network, tokenisation not included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slimexport.machine.energy import Meter
from slimexport.machine.watch import Watch
from slimexport.runtime import Step

# Rounds of warm-up, at least and at most: until no model is more than STEADY faster than in the round before.
WARM_UP = (2, 5)
STEADY = 0.03
TURN = 4  # tokens

Progress = Callable[[int, int], None]
"""Called with rounds done and rounds in all."""


class Timed(Protocol):
    """A model that can be asked for tokens, one sequence at a time."""

    def stepped(self, prompt_ids: NDArray[np.int64], steps: int) -> Iterator[Step]:
        """Seconds and token of a prefill and of each of `steps` further tokens."""
        ...

    def timed_batch(self, prompts: NDArray[np.int64], steps: int) -> float | None:
        """Seconds of `steps` further tokens for each of several prompts [b, t]; None where it cannot."""
        ...


@dataclass(frozen=True)
class Quantities:
    """TTFT of `prompts` tokens, `tokens` decoded after each of `pasts`, whole `batches` after the first of those."""

    prompts: tuple[int, ...]
    pasts: tuple[int, ...]
    tokens: int
    batches: tuple[int, ...] = ()


@dataclass
class Samples:
    """Seconds of every model by round: TTFT by prompt length, ITL by past length, whole batches by their size.
    Energy is of the whole run of a past length, its prefill with it, over the tokens decoded."""

    ttft: dict[str, dict[int, list[float]]]
    itl: dict[str, dict[int, list[list[float]]]]
    batch: dict[str, dict[int, list[float]]]
    joules: dict[str, dict[int, list[float]]]  # a token, by past length; empty where the machine does not tell
    orders: list[list[str]] = field(default_factory=list)
    warm_up: int = 0  # rounds
    watched: dict[str, float] = field(default_factory=dict)
    busy: str | None = None  # what else the machine did; nothing counts then

    @classmethod
    def empty(cls, names: Sequence[str], quantities: Quantities) -> Samples:
        return cls(
            {name: {n: [] for n in quantities.prompts} for name in names},
            {name: {n: [] for n in quantities.pasts} for name in names},
            {name: {n: [] for n in quantities.batches} for name in names},
            {name: {n: [] for n in quantities.pasts} for name in names},
        )

    def joined(self, later: Samples) -> Samples:
        """Both, where neither was measured beside other work; else the one that was not."""
        if self.busy or later.busy:
            return later if self.busy else self

        def both(first: dict[str, dict[int, list[Any]]], then: dict[str, dict[int, list[Any]]]) -> Any:
            return {name: {n: values + then[name][n] for n, values in of.items()} for name, of in first.items()}

        watched = {key: min(value, later.watched[key]) if key == "cpu_share" else max(value, later.watched[key])
                   for key, value in self.watched.items() if key in later.watched}  # fmt: skip
        return Samples(
            both(self.ttft, later.ttft),
            both(self.itl, later.itl),
            both(self.batch, later.batch),
            both(self.joules, later.joules),
            self.orders + later.orders,
            self.warm_up,
            watched,
        )


def measure(
    models: Mapping[str, Timed],
    quantities: Quantities,
    prompt: Callable[[int], NDArray[np.int64]],
    *,
    rounds: int,
    threads: int,
    progress: Progress | None = None,
    enough: Callable[[Samples], bool] | None = None,
    at_most: int = 0,
    warm_up: tuple[int, int] = WARM_UP,
    on_cpu: bool = True,
) -> Samples:
    """`rounds` rounds after the warm-up, of at least and at most `warm_up` rounds. `prompt(n)` gives n tokens, others
    at every call; one call serves all.

    Until these are `enough`, as many again are measured as there are, `at_most` rounds in all. Of rounds beside other
    work and rounds without, the latter count alone, where the models compute `on_cpu`: elsewhere it has most of its
    time to itself however idle the machine.
    """
    warm, before, meter = Samples.empty(list(models), quantities), None, Meter()
    while warm.warm_up < warm_up[1]:
        _round(models, quantities, prompt, warm, warm.warm_up, meter)
        warm.warm_up += 1
        now = {name: _last(warm, name) for name in models}
        if before and warm.warm_up >= warm_up[0] and all(now[name] > before[name] * (1 - STEADY) for name in models):
            break
        before = now

    def measured(first: int, end: int) -> Samples:
        made = Samples.empty(list(models), quantities)
        made.warm_up = warm.warm_up
        with Watch(threads) as watch:
            for number in range(first, end):
                _round(models, quantities, prompt, made, number, meter)
                if progress:
                    progress(number + 1, end)
        made.watched, made.busy = watch.found, watch.busy if on_cpu else None
        return made

    samples = measured(0, rounds)
    while enough and rounds < at_most and not enough(samples):
        more = min(2 * rounds, at_most)
        samples = samples.joined(measured(rounds, more))
        rounds = more
    return samples


def _round(
    models: Mapping[str, Timed],
    quantities: Quantities,
    prompt: Callable[[int], NDArray[np.int64]],
    samples: Samples,
    number: int,
    meter: Meter,
) -> None:
    order = list(models)[:: 1 if number % 2 == 0 else -1]
    samples.orders.append(order)
    for length in sorted({*quantities.prompts, *quantities.pasts}):
        given, decoded = prompt(length), quantities.tokens if length in quantities.pasts else 0
        runs, joules = {}, dict.fromkeys(order, 0.0)
        seconds: dict[str, list[float]] = {name: [] for name in order}
        for name in order:
            # One untimed token first: threads sleep and the caches hold the other model.
            list(models[name].stepped(given[:1], 0))
            before = meter.joules()
            runs[name] = models[name].stepped(given, decoded)
            took, _ = next(runs[name])
            joules[name] += meter.joules() - before
            if length in quantities.prompts:
                samples.ttft[name][length].append(took)
        for turn in range(-(-decoded // TURN)):
            for name in order[:: 1 if turn % 2 == 0 else -1]:
                before = meter.joules()
                seconds[name] += [took for took, _ in islice(runs[name], TURN)]
                joules[name] += meter.joules() - before
        for name in order if decoded else ():
            samples.itl[name][length].append(seconds[name])
            if meter.there:
                samples.joules[name][length].append(joules[name] / decoded)
    for size in quantities.batches:
        several = np.stack([prompt(quantities.pasts[0]) for _ in range(size)])
        for name in order:
            whole = models[name].timed_batch(several, quantities.tokens)
            if whole is not None:
                samples.batch[name][size].append(whole)


def _last(samples: Samples, name: str) -> float:
    """Seconds that everything took in the last round."""
    ttft = sum(values[-1] for values in samples.ttft[name].values())
    return ttft + sum(sum(values[-1]) for values in samples.itl[name].values())
