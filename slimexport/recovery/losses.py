"""What recovery minimises: how far the student's next-token distribution is from the teacher's, and from the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

NOTHING = -100  # the target of a token after which nothing comes
_SMALL = 1e-6
ROWS = 128  # tokens whose distributions are in float32 at once: they stay in the cache, and a vocabulary is wide


def distillation(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    text_share: float = 0.0,
    temperature: float = 1.0,
) -> torch.Tensor:
    """(1 - s) T^2 KL(teacher || student), at temperature T, + s (-log p of the text), the mean over the tokens that
    have a target: float32 [].

    The factor T^2 keeps gradients of the first part as large as without a temperature (Hinton et al., arXiv
    1503.02531, section 2). Computed a few rows at a time in float32, the gradient along with it: nothing as wide as the
    vocabulary is kept but one gradient in the logits' own precision.

    Args:
        student: logits [tokens, vocab], any float dtype.
        teacher: logits likewise; None where `text_share` is 1.
        targets: int64 [tokens], the tokens that the text goes on with, or NOTHING.
        text_share: s, from 0 to 1.
    """
    if teacher is None and text_share < 1:
        raise ValueError("distillation needs the teacher's logits unless text_share is 1")
    loss: torch.Tensor = _Distillation.apply(student, teacher, targets, text_share, temperature)
    return loss


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        targets: torch.Tensor,
        share: float,
        temperature: float,
    ) -> torch.Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        tokens = int((targets != NOTHING).sum())
        gradient = torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        for start in range(0, len(student), ROWS):
            rows = slice(start, start + ROWS)
            counted = targets[rows] != NOTHING
            given, wanted = student[rows].to(wide), targets[rows].unsqueeze(1).clamp(min=0)
            slope = torch.zeros_like(given)
            if share < 1:
                assert teacher is not None
                own = functional.log_softmax(given / temperature, -1)
                other = functional.log_softmax(teacher[rows].to(wide) / temperature, -1)
                p = other.exp()
                total += (1 - share) * temperature**2 * (p * other.sub_(own)).sum(1)[counted].sum()
                slope.add_(own.exp_().sub_(p), alpha=(1 - share) * temperature)
            if share > 0:
                own = functional.log_softmax(given, -1)
                total -= share * own.gather(1, wanted)[counted].sum()
                slope.add_(own.exp_(), alpha=share)
                slope.scatter_add_(1, wanted, torch.full_like(wanted, -share, dtype=wide))
            slope[~counted] = 0
            gradient[rows] = slope / tokens
        ctx.save_for_backward(gradient)
        return (total / tokens).to(wide)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient), None, None, None, None


def relative_error(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of ||made - wanted||^2 / ||wanted||^2: [..., width] -> float32 []. A few tokens have hidden
    states a thousand times as large as all others (attention sinks): they count once each, like any other."""
    wanted = wanted.float()
    size = wanted.square().sum(-1)
    return ((made.float() - wanted).square().sum(-1) / (size + _SMALL)).mean()


def hidden_states(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean `relative_error` of outputs of blocks, each [sequences, length, width]; 0 of none."""
    errors = [relative_error(*both) for both in zip(student, teacher, strict=True)]
    return torch.stack(errors).mean() if errors else torch.zeros(())


@torch.no_grad()
def distances(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    """KL(teacher || student) and -log p of the text in nats, the sums over the tokens that have a target; arguments as
    above."""
    divergence = nll = 0.0
    for own, other, wanted in zip(student.split(ROWS), teacher.split(ROWS), targets.split(ROWS), strict=True):
        counted = wanted != NOTHING
        q, p = functional.log_softmax(own[counted].float(), -1), functional.log_softmax(other[counted].float(), -1)
        divergence += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        nll -= float(q.gather(1, wanted[counted].unsqueeze(1)).sum(dtype=torch.float64))
    return divergence, nll


def targets_of(ids: torch.Tensor) -> torch.Tensor:
    """int64 [sequences * length] of windows [sequences, length]: the token after each, NOTHING after the last."""
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = NOTHING
    return targets.flatten()
