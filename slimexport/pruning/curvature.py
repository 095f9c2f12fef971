"""How much the model's output minds an error in what a block adds to the residual: the Fisher information there.

G = mean over tokens of g g^T, where g is the gradient of the NLL of tokens that are drawn from the model's own
distribution, by the outputs of o_proj and of down_proj. tr(D H D^T G) / 2 is then about the KL that a change D of the
matrix costs (the two factors of LLM Surgeon, arXiv 2312.17244, section 3, after K-FAC, arXiv 1503.05671); the plain
squared error takes G for the identity. What compensation and re-fit give does not depend on G, what is chosen does.

One pass forwards keeps the hidden states before every block, one backwards runs each block once more: weights are
loaded twice, one block at a time, and no weight's gradient is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimexport.architectures.base import Architecture
from slimexport.errors import BadInputError
from slimexport.pruning.blocks import BlockSource
from slimexport.pruning.forward import Arguments, Settings, output, watch, working_copy
from slimexport.pruning.hessian import check_finite, overflow
from slimexport.pruning.states import HiddenStates

DAMPING = 0.1  # of G, as a share of its mean diagonal: a few thousand tokens say little about the directions below it

BlockCurvature = Mapping[str, torch.Tensor]
"""Name of an output matrix -> G, float32 [out, out] on the CPU."""


class _Kept(Sequence[BlockCurvature]):
    """Of all blocks, their matrices wherever they are kept."""

    def __init__(self, names: Sequence[Sequence[str]], matrices: HiddenStates):
        """`matrices`: of the blocks' `names`, the last block's first, as they are measured."""
        self._numbers: list[dict[str, int]] = []
        end = len(matrices)
        for of_block in names:
            end -= len(of_block)
            self._numbers.append({name: end + i for i, name in enumerate(of_block)})
        self._matrices = matrices

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, block: Any) -> Any:
        return {name: self._matrices[number] for name, number in self._numbers[block].items()}


@dataclass(frozen=True)
class Weighting:
    """R with R^T R = G, damped: errors of R W, each counting alike, are those of W as the model's output sees them."""

    R: torch.Tensor  # [out, out], upper triangular, float64

    @classmethod
    def of(cls, G: torch.Tensor | None, device: torch.device) -> Weighting | None:
        """None where there is no G, or where nothing was ever sensitive to this output."""
        if G is None or not float(G.diagonal().sum()) > 0:
            return None
        damped = G.to(device, torch.float64, copy=True)
        damped.diagonal().add_(DAMPING * damped.diagonal().mean())
        return cls(torch.linalg.cholesky(damped, upper=True))


def weighted(W: torch.Tensor, weighting: Weighting | None) -> torch.Tensor:
    """W [out, in], or R W where errors are weighted."""
    return W if weighting is None else weighting.R @ W


def unweighted(W: torch.Tensor, weighting: Weighting | None) -> torch.Tensor:
    """The W that `weighted` turns into this one. Columns of zeros stay zeros."""
    return W if weighting is None else torch.linalg.solve_triangular(weighting.R, W.to(weighting.R), upper=True)


def measure_curvature(
    *,
    source: BlockSource,
    states: HiddenStates,
    arguments: Arguments,
    scores: Callable[[torch.Tensor], torch.Tensor],
    architecture: Architecture,
    settings: Settings,
) -> Sequence[BlockCurvature]:
    """G of the two outputs of every block of the dense model.

    Args:
        states: hidden states before block 0, per batch; overwritten.
        scores: hidden states after the last block -> gradients by them of the drawn tokens' NLL, summed.

    Raises BadInputError where a gradient overflows.
    """
    batches = range(len(states))
    tokens = sum(states[batch].shape[0] * states[batch].shape[1] for batch in batches)
    before: list[HiddenStates] = []
    with torch.no_grad():
        for index in range(len(source)):
            before.append(settings.keep(states[batch] for batch in batches))
            work = working_copy(source.load(index), settings)
            for batch in batches:
                states[batch] = output(work(states[batch], **arguments(index, batch)))
                check_finite(states[batch], index, settings.dtype)
            source.release(index)
    gradients = settings.keep(scores(states[batch]) for batch in batches)
    found = settings.keep.of_the_host()()
    for index in reversed(range(len(source))):
        work = working_copy(source.load(index), settings)
        names = architecture.by_block[index].outputs
        G = {name: torch.zeros(architecture.hidden, architecture.hidden, device=settings.device) for name in names}
        states_before = before.pop()
        for batch in batches:
            with torch.enable_grad(), _repeatable(settings.device):
                entering = states_before[batch].detach().requires_grad_()
                seen = watch(work, names, entering, arguments(index, batch))
                wanted = [entering, *(seen.outputs[name] for name in names)]
                gradients[batch], *by_output = torch.autograd.grad(seen.output, wanted, gradients[batch])
            for name, gradient in zip(names, by_output, strict=True):
                g = gradient.flatten(0, -2).float()
                G[name] += g.T @ g
        if not all(bool(torch.isfinite(total).all()) for total in G.values()):
            raise BadInputError(f"The gradients of block {index} overflow in {overflow(settings.dtype)}.")
        source.release(index)
        for total in G.values():
            found.append((total / tokens).cpu())
    return _Kept([own.outputs for own in architecture.by_block], found)


def _repeatable(device: torch.device) -> AbstractContextManager[None]:
    """Within it, attention's backward pass gives the same bits again: CUDA's fused ones do not."""
    return nullcontext() if device.type == "cpu" else sdpa_kernel(SDPBackend.MATH)
