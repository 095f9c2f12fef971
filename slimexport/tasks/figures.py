"""Figures of the report from what models got in a task, shrunk beside dense on the same questions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from slimexport.artifacts import Figure
from slimexport.gates.evidence import questions_interval
from slimexport.tasks.score import Scores, differing, gap

CONFIDENCE = 0.95


def task_figures(own: Scores, dense: Scores | None, torch: Scores | None) -> tuple[Figure, ...]:
    """`task.NAME.METRIC` with the paired interval of its ratio; `task.NAME.torch_agreement` where the checkpoint was
    asked too: the share of questions that it and its graph score alike."""
    made = [_metric(own, dense, metric) for metric in own.metrics]
    if torch is not None and own.questions:
        made.append(_agreement(own, torch))
    return tuple(made)


def record(own: Scores, dense: Scores | None, torch: Scores | None) -> dict[str, Any]:
    """Every score, so that the figures can be recomputed, and gates decided by them."""
    each = {"shrunk": own, "baseline": dense, "checkpoint": torch}
    return {
        "questions": {name: {m: list(v) for m, v in of.questions.items()} for name, of in each.items() if of},
        "metrics": {name: dict(of.metrics) for name, of in each.items() if of},
    }


def _metric(own: Scores, dense: Scores | None, metric: str) -> Figure:
    name, value = f"task.{own.task}.{metric}", own.metrics[metric]
    better = "lower" if metric in own.lower_is_better else "higher"
    scores = np.asarray(own.questions.get(metric, ()), np.float64)
    note = f"{len(scores)} questions" if len(scores) else "no score of single questions"
    if dense is None or metric not in dense.metrics:
        if len(scores) > 1:
            note += f", standard error {scores.std(ddof=1) / math.sqrt(len(scores)):.4f}"
        return Figure(name, "score", shrunk=value, better=better, note=note)
    other = np.asarray(dense.questions.get(metric, ()), np.float64)
    low = high = None
    if len(scores) > 1:
        difference = scores - other
        error = difference.std(ddof=1) / math.sqrt(len(difference))
        note += f", difference {difference.mean():+.4f} with a standard error of {error:.4f}, on the same questions"
        if other.sum() > 0:
            low, high = questions_interval(scores, other, 1 - CONFIDENCE)
    ratio = value / dense.metrics[metric] if dense.metrics[metric] else None
    return Figure(
        name, "score", shrunk=value, baseline=dense.metrics[metric], ratio=ratio, ratio_low=low, ratio_high=high,
        better=better, note=note,
    )  # fmt: skip


def _agreement(own: Scores, torch: Scores) -> Figure:
    different = sorted({number for metric in own.questions for number in differing(own, torch, metric)})
    count = len(next(iter(own.questions.values())))
    return Figure(
        f"task.{own.task}.torch_agreement", "share", shrunk=1 - len(different) / count, better="higher",
        note=f"{count - len(different)} of {count} questions are scored alike by the graph and by torch"
        + "".join(f"; question {number}{_why(own, torch, number)}" for number in different),
    )  # fmt: skip


def _why(own: Scores, torch: Scores, number: int) -> str:
    """A question whose choices are nearly as likely is decided by rounding."""
    gaps: Mapping[str, float | None] = {"graph": gap(own, number), "torch": gap(torch, number)}
    said = [f"{name} {value:.4f}" for name, value in gaps.items() if value is not None]
    return f" (best choice ahead by: {', '.join(said)} nats)" if said else ""
