"""The training loop of recovery: a student toward its teacher, within a budget, never ending worse than it began.

Held-out windows of every domain are judged at the beginning and EVALUATIONS times after that; the state that is
best at them is what comes out. All that decides the next step is in the state that is saved there, so that a
resumed run goes on as if nothing had happened.

Of several ranks each takes every so many of a step's windows, and gradients are added up; the first one's clock and
files are those that count, so that all take the same steps.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from slimexport.artifacts import HeldOut, RecoveryPoint, from_dict
from slimexport.errors import BadInputError, first_sentence
from slimexport.machine.heap import give_back
from slimexport.progress import Progress
from slimexport.ranks import ALONE, Message, Ranks, summed
from slimexport.recovery.budget import Budget
from slimexport.recovery.domains import Domain, OutOfTextError, Turns
from slimexport.recovery.losses import NOTHING, distances, distillation, hidden_states, targets_of
from slimexport.recovery.optimisers import moments, optimiser, take_moments
from slimexport.recovery.state import Tensors, TrainingState

WARM_UP = 0.1  # of all steps
LAST_RATE = 0.02  # of the learning rate, at the end of the cosine
CLIP = 1.0  # norm of the gradient
EVALUATIONS = 6
SHARE = 6  # training takes so many times as long as judging, at least: fewer evaluations of a short time
MEASURED_STEPS = 4  # until a time is turned into steps, the first being slower than the others
PATIENCE = 3  # evaluations in a row that are no better
SPIKE = 2.0  # times the largest of recent losses, or the best on held-out text: the last saved state is gone back to
RECENT = 20  # steps: batches differ, by domain above all
ROLLBACKS = 3
WORN_OUT = "all of the text was gone through as often as it helps: more text would help more"
T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """How to train. A step has `sequences` windows, of which `together` are in one forward pass."""

    budget: Budget
    learning_rate: float
    sequences: int
    together: int
    text_share: float = 0.0
    temperature: float = 1.0
    hidden_weight: float = 0.0
    optimiser: str = "adamw"
    autocast: torch.dtype | None = None  # None: the forward passes are in the weights' own precision
    seed: int = 0
    lighter: str = "a shorter --recover-length"  # what to ask for where memory is short


def falling(done: float) -> float:
    """The share of the learning rate after warm-up: a cosine from 1 to LAST_RATE."""
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def rate_of_time(used: float, taken: int, first: float = WARM_UP**2) -> float:
    """The share of the learning rate of the next step, where `taken` ones have `used` a share of the budget; `first`:
    what the first one is going to use. Linear warm-up to the end of that step, then the cosine."""
    reached = used * (taken + 1) / taken if taken else first
    return min(reached / WARM_UP, 1.0) * falling(min(max(used - WARM_UP, 0.0) / (1 - WARM_UP), 1.0))


@dataclass(frozen=True)
class Trained:
    """`points` begin with the student as it was given; `best` is the index of the one whose weights it has now."""

    points: tuple[RecoveryPoint, ...]
    best: int
    steps: int
    tokens: int
    seconds: float
    stopped: str
    notes: tuple[str, ...]


@dataclass
class _Numbers:
    """Where a training is: all that is not a tensor."""

    step: int = 0
    total: int | None = None  # steps; of a time the latest estimate
    seconds: float = 0.0
    scale: float = 1.0  # of the learning rate, halved by every rollback
    rollbacks: int = 0
    worse: int = 0  # evaluations since the best
    best: int = 0
    judged: int = 0  # at which step it was judged last
    block: int = 0  # how many are done, where they are trained one by one
    taken: int = 0  # steps, with those that were gone back by
    used: float = 0.0  # share of what a budget of time leaves for steps
    judging: float = 0.0  # seconds that it took last
    looked: float = 0.0  # seconds that it took in all


class Training:
    """`run` trains what of `student` requires a gradient, in place; `teacher` is only asked.

    Raises BadInputError where the budget is shorter than one step.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        domains: Sequence[Domain],
        recipe: Recipe,
        progress: Progress,
        ranks: Ranks = ALONE,
    ):
        self.student, self.teacher, self.domains, self.recipe = student, teacher, domains, recipe
        self.progress, self.ranks = progress, ranks
        self._state: TrainingState | None = None
        self.device = next(student.parameters()).device
        self.trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.optimiser = optimiser(recipe.optimiser, self.trained.values(), recipe.learning_rate)
        self.together = recipe.together  # fewer where the device has no room for them
        self.turns = Turns(domains, recipe.seed)
        self.at = _Numbers()
        self.points: list[RecoveryPoint] = []
        self.recent: list[float] = []
        self.notes: list[str] = []
        self.tokens_per_step = self._sequences_of_a_step() * domains[0].train.shape[1]
        self.planned = recipe.budget.steps(self.tokens_per_step)  # None: only their time will tell
        windows = sum(len(domain.train) for domain in domains)
        if windows < recipe.sequences:
            raise BadInputError(
                f"The text is too short to recover on: it holds {windows} sequences to train on, of "
                f"{domains[0].train.shape[1]} tokens, needed are {recipe.sequences}, as many as a step takes. "
                "Give more, or fewer --recover-sequences."
            )
        if self.planned == 0:
            raise BadInputError(
                f"A budget of {recipe.budget} is shorter than one step, which has {self.tokens_per_step} tokens: "
                "give more, or fewer --recover-sequences."
            )

    def _sequences_of_a_step(self) -> int:
        return self.recipe.sequences

    def run(self, state: TrainingState | None) -> Trained:
        """Goes on from `state` where there is anything in it, and keeps it up to date; None for ranks that are not the
        first."""
        self._state = state
        for model in (self.student, self.teacher):
            model.eval()  # while it is trained, too: dropout would be draws that a resumed run has to repeat
        self.begun = time.monotonic()
        if not self._resumed():
            self.at.total = self.planned
            self._judge(loss=None)
            if self.ranks.size > 1:
                self._take("best")  # adapters were drawn by each rank
        stopped = self._steps()
        self._take("best")
        at = self.at
        return Trained(
            tuple(self.points), at.best, at.step, at.step * self.tokens_per_step, self._elapsed(), stopped,
            tuple(self.notes),
        )  # fmt: skip

    def _elapsed(self) -> float:
        return self.at.seconds + time.monotonic() - self.begun

    def _stepping(self) -> float:
        """Seconds of it that went into steps."""
        return self._elapsed() - self.at.looked

    def _steps(self) -> str:
        """Trains until the budget, the patience or the text is used up, and says which."""
        while self.at.total is None or self.at.step < self.at.total:
            if self.at.worse >= PATIENCE:
                return "patience"
            try:
                batch = self.turns.batch(self.recipe.sequences)
            except OutOfTextError:
                if WORN_OUT not in self.notes:
                    self.notes.append(WORN_OUT)
                if self.at.judged < self.at.step:
                    self._judge(statistics.fmean(self.recent))
                return "text"
            loss = self._step(batch)
            self.at.taken += 1
            usual = max(self.recent) if len(self.recent) == RECENT else math.inf
            if loss is None or loss > SPIKE * usual:
                if not self._rolled_back("the loss was not finite" if loss is None else f"the loss rose to {loss:.3g}"):
                    return "instability"
                continue
            self.at.step += 1
            self.recent = [*self.recent, loss][-RECENT:]
            due = self._due()
            self._say(loss)
            if due:
                self._judge(statistics.fmean(self.recent))
                if not self.points[-1].judged <= SPIKE * self.points[self.at.best].judged:
                    self.points.pop()  # it may be no number; a note says what was
                    if not self._rolled_back("the held-out windows got worse by far"):
                        return "instability"
        return "budget"

    # ------------------------------------------------------------------------------------------------------ one step

    def _step(self, batch: torch.Tensor) -> float | None:
        """The mean loss of the batch; None, and nothing is changed, where it or its gradient is not finite."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.learning_rate * self.at.scale * self._share_of_rate()
        part = self._with_room(lambda: self._gradient(batch))
        return self._update(part, list(self.trained.values()), self._apply)

    def _update(self, part: float, parameters: Sequence[nn.Parameter], step: Callable[[], object]) -> float | None:
        """A `step` by the gradients of all ranks, clipped; returns the sum of their parts of the mean loss. None, and
        nothing is changed, where that or the gradient is not finite."""
        total = self._added_up(part, parameters)
        norm = nn.utils.clip_grad_norm_(parameters, CLIP)
        finite = math.isfinite(total) and bool(torch.isfinite(norm))
        if finite:
            step()
        for parameter in parameters:
            parameter.grad = None
        return total if finite else None

    def _apply(self) -> None:
        try:
            self.optimiser.step()
        except torch.OutOfMemoryError as error:  # the first one makes the moments
            raise BadInputError(
                f"{self.device} has no room for the moments of the optimiser ({first_sentence(error)}): "
                f"{self.recipe.lighter} needs less."
            ) from error

    def _gradient(self, batch: torch.Tensor) -> float:
        """Of this rank's part of the batch; returns what that adds to the mean loss."""
        self.optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for some in self._own_part(batch):
            loss = self._loss(some) * (len(some) / len(batch))
            loss.backward()
            total += float(loss.detach())
        return total

    def _own_part(self, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        """This rank's of `windows`, as many at once as there is room for; nothing where there are fewer than ranks."""
        own = windows[self.ranks.rank :: self.ranks.size]
        for start in range(0, len(own), self.together):
            yield own[start : start + self.together].to(self.device)

    def _added_up(self, total: float, parameters: Iterable[nn.Parameter]) -> float:
        """Gradients become the sum of all ranks'; returns the sum of `total`."""
        if self.ranks.size == 1:
            return total
        gradients: list[torch.Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:  # fewer windows than ranks, or an expert that no token went to
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.ranks.add_up(gradients)
        return summed(self.ranks, total)

    def _with_room(self, work: Callable[[], T]) -> T:
        """What `work` gives, which is begun anew with fewer sequences at once where the device has no room for it."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                reason = first_sentence(error)
            self._with_less(reason)

    def _with_less(self, reason: str) -> None:
        """From here on half as many sequences in a forward pass. Raises BadInputError where there was but one."""
        if self.together == 1:
            raise BadInputError(
                f"{self.device} ran out of memory ({reason}), with one sequence in a forward pass: "
                f"{self.recipe.lighter} needs less."
            )
        self.together = (self.together + 1) // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        note = f"{self.device} ran out of memory: going on with {self.together} sequences in a forward pass"
        self.notes.append(note)
        self.progress.note(note)

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        recipe = self.recipe
        hidden = recipe.hidden_weight > 0
        given = self._asked(ids, hidden) if hidden or recipe.text_share < 1 else None
        with self._precision():
            made = self.student(ids, use_cache=False, output_hidden_states=hidden)
        loss = distillation(
            made.logits.flatten(0, 1),  # a view: without the last of every window it would be a copy
            None if given is None else given.logits.flatten(0, 1),
            targets_of(ids),
            text_share=recipe.text_share,
            temperature=recipe.temperature,
        )
        if hidden:
            assert given is not None
            # Of what comes after the embedding; the last is behind the final norm, which logits see and pruning scales.
            loss = loss + recipe.hidden_weight * hidden_states(made.hidden_states[1:-1], given.hidden_states[1:-1])
        return loss

    @torch.no_grad()
    def _asked(self, ids: torch.Tensor, hidden: bool = False) -> Any:
        with self._precision():
            return self.teacher(ids, use_cache=False, output_hidden_states=hidden)

    def _precision(self) -> torch.autocast:
        wanted = self.recipe.autocast
        return torch.autocast(self.device.type, wanted or torch.bfloat16, enabled=wanted is not None)

    def _share_of_rate(self) -> float:
        """Linear warm-up, then a cosine, over the steps or the time."""
        if self.planned is None:
            return rate_of_time(self.at.used, self.at.taken)
        total = self.planned
        warm = max(1, round(WARM_UP * total))
        if self.at.step < warm:
            return (self.at.step + 1) / warm
        done = min((self.at.step - warm) / max(1, total - warm), 1.0)
        return falling(done)

    def _estimate(self) -> None:
        if self.planned is not None:
            return
        training = self._stepping()
        left = max(self.recipe.budget.amount - self.at.judging - self._elapsed(), 0.0)
        self.at.used = training / (training + left)
        if self.at.taken >= MEASURED_STEPS or not left:
            self.at.total = self.at.step + int(left / training * self.at.taken)

    def _say(self, loss: float) -> None:
        at, elapsed = self.at, self._elapsed()
        speed = at.step * self.tokens_per_step / elapsed
        best = self.points[self.at.best]
        text = f"loss {loss:.3f}, held-out {best.nll:.3f} (KL {best.divergence:.3f}), {speed:.0f} tokens/s"
        if self.recipe.budget.unit == "seconds":
            self.progress.update(min(elapsed, self.recipe.budget.amount), self.recipe.budget.amount, text)
        else:
            self.progress.update(at.step, at.total or at.step, text)

    # ------------------------------------------------------------------------------------------- judging, going back

    def _due(self) -> bool:
        """Whether it is time to judge, by the first rank's clock, and what the budget comes to."""

        def look() -> Message:
            self._estimate()
            return Message({"total": self.at.total, "used": self.at.used, "due": self._used_up()})

        said = self.ranks.told(look).values
        self.at.total, self.at.used = said["total"], said["used"]
        return bool(said["due"])

    def _used_up(self) -> bool:
        """Whether another EVALUATIONS-th of the budget is."""
        if self.at.total is None:
            return False
        if self.at.step >= self.at.total:
            return True
        every = max(1, self.at.total // EVALUATIONS)
        if self.recipe.budget.unit == "seconds":
            every = max(every, round(SHARE * self.at.judging * self.at.taken / self._stepping()))
        # the last full one ends with the budget
        return self.at.step - self.at.judged >= every and self.at.total - self.at.step >= every // 2

    def _judge(self, loss: float | None) -> None:
        """One more point of the curve; what is best so far, and where the training is, is saved."""
        begun = time.monotonic()
        found, judged = self._measured()
        give_back()  # judging needs other sizes than training, as does what was done before
        self.at.judging = time.monotonic() - begun
        self.at.looked += self.at.judging
        mean = statistics.fmean(of.divergence for of in found.values())
        if not self.points and not math.isfinite(judged):
            raise BadInputError("The pruned model's loss on the held-out text is not finite: nothing can be trained.")
        self.points.append(
            RecoveryPoint(
                self.at.step, self.at.step * self.tokens_per_step, round(self._elapsed(), 1), loss, mean, judged, found,
                dict(self.turns.weights),
            )
        )  # fmt: skip
        better = len(self.points) == 1 or judged < self.points[self.at.best].judged
        if better:
            self.at.best, self.at.worse = len(self.points) - 1, 0
        else:
            self.at.worse += 1
        self.at.judged = self.at.step
        self.turns.follow({name: of.divergence for name, of in found.items()})
        if judged <= SPIKE * self.points[self.at.best].judged:
            self._save(better)

    def _measured(self) -> tuple[dict[str, HeldOut], float]:
        """The held-out windows by domain, and what the student is judged by: the loss on them, every domain alike."""
        found = {domain.name: self._with_room(partial(self._held_out, domain)) for domain in self.domains}
        share = self.recipe.text_share
        each = [(1 - share) * of.divergence + share * of.nll for of in found.values()]
        return found, statistics.fmean(each)

    def judged(self, finished: nn.Module) -> float:
        """As a point's, of what was made of the student after `run`, by this process alone."""
        self.student, self.ranks = finished, ALONE
        return self._measured()[1]

    @torch.no_grad()
    def _held_out(self, domain: Domain) -> HeldOut:
        divergence = nll = 0.0
        tokens = 0
        for ids in self._own_part(domain.held_out):
            with self._precision():
                own = self.student(ids, use_cache=False).logits.flatten(0, 1)
            targets = targets_of(ids)
            one, other = distances(own, self._asked(ids).logits.flatten(0, 1), targets)
            divergence, nll, tokens = divergence + one, nll + other, tokens + int((targets != NOTHING).sum())
        every = summed(self.ranks, tokens)
        # The last bits of sums in float32 can be below zero.
        return HeldOut(max(summed(self.ranks, divergence), 0.0) / every, summed(self.ranks, nll) / every)

    @property
    def state(self) -> TrainingState:
        assert self._state is not None  # of the first rank
        return self._state

    def _save(self, better: bool) -> None:
        if self.ranks.rank:
            return
        tensors: dict[str, Mapping[str, torch.Tensor]] = {}
        if self.at.step:
            tensors |= {"weights": self.trained, "moments": moments(self.optimiser, self.trained)}
        if better:
            tensors["best"] = self.trained
        numbers = {
            "at": asdict(replace(self.at, seconds=self._elapsed())),
            "turns": self.turns.state(),
            "points": [asdict(point) for point in self.points],
            "recent": self.recent,
            "notes": self.notes,
            "together": self.together,
        }
        self.state.save(numbers, tensors)

    def _resumed(self) -> bool:
        """Whether there was a state to go on from."""
        numbers = self._saved_numbers()
        if numbers is None:
            return False
        self._restore(numbers)
        self.points = [from_dict(RecoveryPoint, of, "the saved state of recovery") for of in numbers["points"]]
        self.notes = list(numbers["notes"])
        self.progress.note(f"going on after step {self.at.step}")
        return True

    def _restore(self, numbers: Mapping[str, Any]) -> None:
        self.at = _Numbers(**numbers["at"])
        if not self.ranks.rank:  # others have room of their own
            self.together = min(self.together, numbers.get("together", self.together))
        self.begun = time.monotonic()
        self.turns.restore(numbers["turns"])
        self.recent = list(numbers["recent"])
        self._take("weights" if self.at.step else "best")
        take_moments(self.optimiser, self.trained, self._saved("moments") if self.at.step else {})

    def _saved_numbers(self) -> dict[str, Any] | None:
        said = self.ranks.told(lambda: Message({"numbers": self.state.numbers()}))
        numbers: dict[str, Any] | None = said.values["numbers"]
        return numbers

    def _saved(self, what: str) -> Tensors:
        return dict(self.ranks.told(lambda: Message(tensors=self.state.tensors(what))).tensors)

    @torch.no_grad()
    def _take(self, what: str) -> None:
        """The weights that were saved last as `what`."""
        saved = self._saved(what)
        for name, parameter in self.trained.items():
            parameter.copy_(saved[name])

    def _rolled_back(self, why: str) -> bool:
        """Goes on from the last saved state, at half the learning rate, with the text after that of the failure; False
        where that has been done ROLLBACKS times."""
        if self.at.rollbacks >= ROLLBACKS:
            self.notes.append(f"given up at step {self.at.step}: {why} again after {ROLLBACKS} rollbacks")
            return False
        numbers = self._saved_numbers()
        assert numbers is not None  # the first point was saved
        at, elapsed, turns = self.at, self._elapsed(), self.turns.state()
        self._restore(numbers)
        note = f"at step {at.step} {why}: back to step {self.at.step}, at half the learning rate"
        self.notes.append(note)
        self.progress.note(note)
        # Weights are those of the saved state: what came out now may be no number, and counts no more.
        self.turns.restore({**turns, "weights": self.turns.weights})
        self.at.scale, self.at.rollbacks = at.scale / 2, at.rollbacks + 1
        self.at.seconds, self.at.worse, self.at.total = elapsed, at.worse, at.total
        self.at.taken, self.at.used, self.at.judging, self.at.looked = at.taken, at.used, at.judging, at.looked
        self.recent = []
        return True
