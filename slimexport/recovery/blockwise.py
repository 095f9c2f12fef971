"""Block by block toward what the dense block gives, without a pass through the whole model.

Two streams of hidden states, through the dense blocks and through the trained ones before; of one block at a time there
are gradients and moments. What a block learns is what its own inputs allow: errors of blocks before are seen, and what
an error does to the output is not (recovery/training.py sees both).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from slimexport.architectures.base import Architecture
from slimexport.errors import BadInputError, first_sentence
from slimexport.pruning.forward import Arguments, Settings, advance, first_states, output
from slimexport.pruning.states import HiddenStates
from slimexport.ranks import Message, summed
from slimexport.recovery.domains import Turns
from slimexport.recovery.losses import relative_error
from slimexport.recovery.memory import TOKENS
from slimexport.recovery.optimisers import optimiser
from slimexport.recovery.training import EVALUATIONS, RECENT, WARM_UP, Training, rate_of_time

PASSING = 0.25  # of a block's part of a time, at most, to put windows through both streams
ASIDE = 8  # one batch of so many is not trained on: a block that got no better by it stays as it was


class BlockwiseTraining(Training):
    """The blocks have equal shares of the budget. A resumed training goes on after the block that was judged last."""

    def __init__(self, architecture: Architecture, *arguments: Any):
        super().__init__(*arguments)
        self._architecture = architecture
        of = architecture.family.blocks
        self._blocks, self._dense = (list(model.get_submodule(of).children()) for model in (self.student, self.teacher))
        if self.planned is not None and self.planned < len(self._blocks):
            raise BadInputError(
                f"A budget of {self.recipe.budget} is shorter than one step for each of {len(self._blocks)} blocks, of "
                f"{self.tokens_per_step} tokens each: give more"
                f"{', or fewer --recover-sequences' if self.recipe.budget.unit == 'tokens' else ''}."
            )

    def _steps(self) -> str:
        try:
            return self._one_by_one()
        except torch.OutOfMemoryError as error:
            raise BadInputError(
                f"{self.device} ran out of memory at block {self.at.block + 1} ({first_sentence(error)}): give fewer "
                "--recover-sequences, or a shorter --recover-length."
            ) from error

    def _one_by_one(self) -> str:
        count = len(self._blocks)
        ids = self._windows()
        own, known = self._states(self.student, ids)
        other, given = self._states(self.teacher, ids)
        for index in range(self.at.block):
            self._advance(other, given, self._dense[index], index)
            self._advance(own, known, self._blocks[index], index)
        for index in range(self.at.block, count):
            self._advance(other, given, self._dense[index], index)
            self._fit(index, own, other, known, self.planned // count if self.planned else None)
            self._advance(own, known, self._blocks[index], index)
            self.at.block = index + 1
            if self.at.block % self._every == 0 or self.at.block == count:
                self._judge(statistics.fmean(self.recent) if self.recent else None)
        return "budget"

    @property
    def _every(self) -> int:
        """Blocks, after which it is judged."""
        return max(1, len(self._blocks) // EVALUATIONS)

    def _windows(self) -> torch.Tensor:
        """int64 [windows, length], each of them once: what is set aside is not trained on as well."""
        windows = sum(len(domain.train) for domain in self.domains)
        length = self.domains[0].train.shape[1]
        count = min(windows, max(2 * ASIDE, min(TOKENS // length, self._useful())))
        ids = Turns(self.domains, self.recipe.seed).batch(count)
        return torch.tensor(list(dict.fromkeys(tuple(window) for window in ids.tolist())))

    def _useful(self) -> int:
        """Windows that a block's steps can see, with those set aside; of a time as many as go through both streams in
        PASSING of a block's part of it."""
        blocks = len(self._blocks)
        if self.planned is not None:
            return -(-self.planned // blocks) * self._sequences_of_a_step() * ASIDE // (ASIDE - 1) + ASIDE

        def timed() -> Message:
            ids = Turns(self.domains, self.recipe.seed).batch(self._together * self.ranks.size)
            states, known = self._states(self.student, ids)
            for _ in range(2):  # the first call is slower
                begun = time.monotonic()
                self._advance(states, known, self._blocks[0], 0)
            each = 2 * (time.monotonic() - begun) / self._together
            part = PASSING * self.recipe.budget.amount / blocks
            return Message({"windows": int(self.ranks.size * part / each) if each else TOKENS})

        return int(self.ranks.told(timed).values["windows"])

    def _states(self, model: Any, ids: torch.Tensor) -> tuple[HiddenStates, Arguments]:
        settings = Settings(
            device=self.device, dtype=next(model.parameters()).dtype, group_size_start=None, group_size_end=None,
            damping=0.0, ranks=self.ranks, batch_tokens=self._together * ids.shape[1],
        )  # fmt: skip
        return first_states(model, self._architecture, ids, settings)

    def _advance(self, states: HiddenStates, arguments: Arguments, block: nn.Module, index: int) -> None:
        with torch.no_grad(), self._precision():
            advance(states, index, block, arguments)

    @property
    def _together(self) -> int:
        """Sequences in a forward pass, as many in each of a step's; as many where judging has to do with fewer."""
        return -(-self._own_sequences // self._batches)

    def _sequences_of_a_step(self) -> int:
        return self._together * self._batches * self.ranks.size

    @property
    def _batches(self) -> int:
        """Of a step, that each rank takes."""
        return -(-self._own_sequences // self.recipe.together)

    @property
    def _own_sequences(self) -> int:
        return max(1, self.recipe.sequences // self.ranks.size)

    def _fit(self, index: int, inputs: HiddenStates, wanted: HiddenStates, known: Arguments, steps: int | None) -> None:
        """Trains one block for `steps`, or for its share of the time; the weights that were best on what is set aside
        are those that it ends with."""
        block = self._blocks[index]
        trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
        kept = [parameter.detach().clone() for parameter in trained]
        stepping = optimiser(self.recipe.optimiser, trained, self.recipe.learning_rate)
        aside = list(range(0, len(inputs), ASIDE)) if len(inputs) > 1 else [0]
        others = [batch for batch in range(len(inputs)) if batch not in aside] or aside
        generator = torch.Generator().manual_seed(self.recipe.seed * len(self._blocks) + index)

        def distance(batch: int) -> torch.Tensor:
            with self._precision():
                # a clone: some families' blocks add to what they are given
                made = output(block(inputs[batch].clone(), **known(index, batch)))
            return relative_error(made, wanted[batch])

        def judged() -> float:
            with torch.no_grad():
                return self._mean([float(distance(batch)) for batch in aside])

        before = judged()
        batches, first = self._batches, self.at.step
        done = self._share(len(self._blocks) - index, steps)
        order: list[int] = []
        while (share := done()) < 1:
            taken = self.at.step - first
            rate = rate_of_time(share, taken, 1 / steps if steps else WARM_UP**2)
            stepping.param_groups[0]["lr"] = self.recipe.learning_rate * rate
            total = 0.0
            for _ in range(batches):
                if not order:
                    order = [others[at] for at in torch.randperm(len(others), generator=generator).tolist()]
                loss = distance(order.pop()) / (batches * self.ranks.size)
                loss.backward()
                total += float(loss.detach())
            mean = self._update(total, trained, stepping.step)
            self.at.step += 1
            if mean is not None:
                self.recent = [*self.recent, mean][-RECENT:]
        after = judged()
        if not after < before:
            with torch.no_grad():
                for parameter, value in zip(trained, kept, strict=True):
                    parameter.copy_(value)
        text = f"block {index + 1} of {len(self._blocks)}, error {before:.4f} to {min(before, after):.4f}"
        self.progress.update(index + 1, len(self._blocks), text)

    def _mean(self, values: list[float]) -> float:
        return summed(self.ranks, statistics.fmean(values)) / self.ranks.size

    def _share(self, blocks: int, steps: int | None) -> Callable[[], float]:
        """What of the block's part of the budget is used up, asked before every step; at least one is taken."""
        begun, first = time.monotonic(), self.at.step
        judging = self.at.judging * -(-blocks // self._every)
        left = max(self.recipe.budget.amount - self._elapsed() - judging, 0.0) / blocks

        def look() -> Message:
            if self.at.step == first:
                return Message({"share": 0.0})
            if steps is not None:
                return Message({"share": (self.at.step - first) / steps})
            return Message({"share": (time.monotonic() - begun) / left if left else 1.0})

        return lambda: float(self.ranks.told(look).values["share"])
