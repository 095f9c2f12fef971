"""What a change somewhere in the model does to its output: KL to the dense model on a few windows of text, and its
gradient.

Changed blocks are candidates: each has its own hidden states, which go on through the dense blocks after it. All
candidates move together, block by block, so that the weights are read once however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from slimexport.architectures.base import Architecture
from slimexport.pruning.forward import instead
from slimexport.pruning.grid import POSITIONS
from slimexport.pruning.matrices import matrix, set_matrix
from slimexport.pruning.states import Keeper

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Cut:
    """An output matrix with some of its input columns removed and the others compensated for them; of experts, one for
    each of them, along a first dimension."""

    columns: torch.Tensor  # int64 [kept], ascending, in the dense numbering
    W: torch.Tensor  # [out, kept]


@contextmanager
def replaced(block: nn.Module, name: str, cut: Cut | None) -> Iterator[None]:
    """Within it, module `name` of `block` has its dense shape with the matrix of `cut`, zeros where columns went; None:
    the block is as it is, and need not have such a module.

    Zero columns make the removed heads and channels invisible to the rest of the model.
    """
    if cut is None:
        yield
        return
    module = block.get_submodule(name)
    old = matrix(module)
    new = torch.zeros_like(old)
    columns = cut.columns.to(old.device).unsqueeze(-2).expand(cut.W.shape)
    new.scatter_(-1, columns, cut.W.to(old.device, old.dtype))
    set_matrix(module, new)
    try:
        yield
    finally:
        set_matrix(module, old)


class Candidates:
    """Hidden states [sequences, length, hidden] of the dense model and of every candidate, before the same block."""

    def __init__(self, dense: torch.Tensor, keep: Keeper = Keeper()):
        self.dense = dense
        self._states = keep()
        self._numbers: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def __getitem__(self, name: Hashable) -> torch.Tensor:
        return self._states[self._numbers[name]]

    def __setitem__(self, name: Hashable, states: torch.Tensor) -> None:
        if name in self._numbers:
            self._states[self._numbers[name]] = states
        else:
            self._numbers[name] = len(self._states)
            self._states.append(states)

    def branch(self, name: Hashable, changed: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """A new candidate: the dense states through a changed block. To be called before `advance` of that block."""
        self[name] = changed(self.dense)

    def advance(self, block: Callable[[torch.Tensor], torch.Tensor], fresh: set[Hashable] | None = None) -> None:
        """All go through the dense block, but those in `fresh`, which have passed their changed one already."""
        self.dense = block(self.dense)
        for name in self._numbers:
            if name not in (fresh or ()):
                self[name] = block(self[name])

    def divergences(self, logits: Callable[[torch.Tensor], torch.Tensor]) -> dict[Hashable, float]:
        """KL(dense || candidate), mean over positions, nats per token."""
        dense = logits(self.dense).log_softmax(-1)
        shares = dense.exp()
        return {name: divergence(dense, logits(self[name]), shares) for name in self._numbers}


def divergence(dense: torch.Tensor, logits: torch.Tensor, shares: torch.Tensor | None = None) -> float:
    """KL(dense || changed), mean over positions, nats: log probabilities of the dense model (and, where they are at
    hand, its probabilities), logits of the other."""
    difference = logits.log_softmax(-1).neg_().add_(dense)
    difference *= dense.exp() if shares is None else shares
    return max(float(difference.sum(-1).mean(dtype=torch.float64)), 0.0)


def output_logits(
    model: PreTrainedModel, architecture: Architecture, device: torch.device, *, every: int = POSITIONS
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Hidden states after the last block [s, t, hidden] -> float32 logits [s, t // every, vocab].

    The model's own code is run with its blocks passed by, so that final norm, scaling and soft caps are the family's;
    in float32, since logits rounded to bfloat16 differ by more than a small cut costs.
    """
    blocks = list(model.get_submodule(architecture.family.blocks))

    def logits(states: torch.Tensor) -> torch.Tensor:
        keep = torch.arange(every - 1, states.shape[1], every)
        home = next(model.parameters()).device
        states = states.to(home, torch.float32)
        with _after_the_last(blocks, states, architecture), in_float32(model, blocks):
            out = model(inputs_embeds=states, use_cache=False, logits_to_keep=keep)
        return out.logits.to(device).float()

    return logits


def output_scores(
    model: PreTrainedModel, architecture: Architecture, device: torch.device, seed: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Hidden states after the last block [s, t, hidden] -> gradients by them, of the same shape and precision, of the
    NLL (nats, summed) of one token for every position, drawn from what the model itself says there."""
    blocks = list(model.get_submodule(architecture.family.blocks))
    generator = torch.Generator().manual_seed(seed)

    def scores(states: torch.Tensor) -> torch.Tensor:
        home = next(model.parameters()).device
        gradients = []
        with in_float32(model, blocks), torch.enable_grad():
            for sequence in states.split(1):  # logits of a whole batch would be gigabytes
                leaf = sequence.detach().to(home, torch.float32).requires_grad_()
                with _after_the_last(blocks, leaf, architecture):
                    logits = model(inputs_embeds=leaf.detach(), use_cache=False).logits[0].float()
                # Drawn on the CPU, so that every device draws by the same numbers.
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
                nll = nn.functional.cross_entropy(logits, drawn.to(home), reduction="sum")
                gradients.append(torch.autograd.grad(nll, leaf)[0])
        return torch.cat(gradients).to(device, states.dtype)

    return scores


@contextmanager
def in_float32(model: PreTrainedModel, blocks: list[nn.Module]) -> Iterator[None]:
    """Final norm and head, for as long as they are needed: everything that is in no block, but an untied embedding."""
    unused = {id(p) for block in blocks for p in block.parameters()}
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        unused |= {id(p) for p in model.get_input_embeddings().parameters()}
    stored = [(p, p.data) for p in model.parameters() if id(p) not in unused]
    for parameter, data in stored:
        parameter.data = data.float()
    try:
        yield
    finally:
        for parameter, data in stored:
            parameter.data = data


def _after_the_last(
    blocks: list[nn.Module], states: torch.Tensor, architecture: Architecture
) -> AbstractContextManager[None]:
    """Within it, every block of the model gives `states`, whatever it is given: what the model does to its embeddings
    (a factor, positions) does not count."""
    result = (states, None) if architecture.family.returns_tuple else states
    return instead(dict.fromkeys(blocks, lambda *_, **__: result))
