"""Asking a decoder the questions of a task, and what came out of each."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.errors import BadInputError
from slimexport.runtime import Decoder
from slimexport.tasks import named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from slimexport.tasks.harness import Progress


@dataclass(frozen=True)
class Scores:
    """What a model got in a task: `metrics` as lm-eval aggregates them, with the name of the filter behind where it has
    one (`exact_match_strict_match`); `questions` has, by metric that is their mean, the score of each question in
    lm-eval's order, and `answers` what was judged of each (log-likelihoods of its choices, or the text)."""

    task: str
    metrics: Mapping[str, float]
    questions: Mapping[str, tuple[float, ...]]
    answers: tuple[Any, ...] = field(default=(), repr=False)
    lower_is_better: tuple[str, ...] = ()  # metrics


def ask(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    task: named.Named,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Raises BadInputError where lm-eval is missing, has no such task, cannot get its questions, or one of them lacks a
    field; `limit` takes the first questions."""
    named.check((str(task),))
    from lm_eval import simple_evaluate

    from slimexport.tasks.harness import DecoderLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as cache, _quiet():
        try:
            found = simple_evaluate(
                DecoderLM(decoder, tokenizer, progress=progress),
                tasks=[named.spec(task, Path(cache))],
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        except BadInputError:
            raise
        except Exception as error:  # lm-eval, datasets and jinja raise whatever they like
            raise named.unreadable(task, error) from error
    assert found is not None  # it is None in all but the first of several processes
    results, samples = found["results"][task.name], found["samples"][task.name]
    if not samples:
        raise BadInputError(f"Task {task.name} has no questions.")
    by_filter: dict[str, list[Any]] = {}  # what takes the answer out of the text; each has a sample of every question
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        by_filter.setdefault(sample.get("filter", "none"), []).append(sample)
    better = found.get("higher_is_better", {}).get(task.name, {})
    metrics: dict[str, float] = {}
    questions, lower = {}, []
    for key, value in results.items():
        metric, comma, taken = key.rpartition(",")
        if not comma or metric.endswith("_stderr") or not _is_number(value):
            continue
        name = metric if taken == "none" else f"{metric}_{taken.replace('-', '_')}"
        metrics[name] = float(value)
        if better.get(metric) is False:
            lower.append(name)
        each = tuple(float(s[metric]) for s in by_filter.get(taken, ()) if _is_number(s.get(metric)))
        # A perplexity is no mean of its questions' log-likelihoods: nothing is known of it from them.
        if each and len(each) == len(by_filter[taken]) and _is_mean(value, each):
            questions[name] = each
    if not metrics:
        raise BadInputError(f"Task {task.name} was asked, and lm-eval gives no figure for it.")
    answers = tuple(_plain(sample["filtered_resps"]) for sample in next(iter(by_filter.values())))
    return Scores(task.name, metrics, questions, answers, tuple(lower))


def _is_mean(value: float, each: tuple[float, ...]) -> bool:
    return math.isclose(math.fsum(each) / len(each), value, rel_tol=1e-6, abs_tol=1e-9)


def differing(first: Scores, second: Scores, metric: str) -> list[int]:
    """The questions that one of two models got right, and the other did not."""
    pairs = zip(first.questions[metric], second.questions[metric], strict=True)
    return [number for number, (a, b) in enumerate(pairs) if a != b]


def gap(scores: Scores, question: int) -> float | None:
    """By how much the best choice of a question was more likely than the next, in nats; None without choices."""
    answer = scores.answers[question]
    likely = [each[0] for each in answer if isinstance(each, list) and each and _is_number(each[0])]
    if len(likely) < 2:
        return None
    best, next_best, *_ = sorted(likely, reverse=True)
    return float(best - next_best)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, str)


@contextlib.contextmanager
def _quiet() -> Any:
    """lm-eval draws bars of its own."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.environ.pop("TQDM_DISABLE", None)
        if before is not None:
            os.environ["TQDM_DISABLE"] = before
