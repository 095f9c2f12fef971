"""ARC-Easy with lm-eval, offline, on a torch model in memory.

pip install lm-eval==0.4.13
"""

from __future__ import annotations

import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from slimexport.errors import BadInputError

TASK = "arc_easy_local"
BATCH = 8  # questions in one forward pass, all of one length; their choices follow in a second one
METRICS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


def arc_easy(model: Any, tokenizer: Any, path: Path, limit: int | None = None, batch: int = BATCH) -> dict[str, Any]:
    """`acc`, `acc_norm` (log-likelihood per character), their standard errors, and `questions`; zero-shot.

    `path` is a JSONL file in the layout of `allenai/ai2_arc`. Prompt, choices and metrics are those of lm-eval's own
    `arc_easy`; only where the questions come from differs. `limit` takes the first questions. Raises BadInputError
    where lm-eval or the file is missing.

    A question goes through the model once, and its choices after its cached keys and values: lm-eval itself runs it
    again for every choice, which is three times the work here.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise BadInputError("The task needs: pip install lm-eval==0.4.13") from None
    if not Path(path).is_file():
        raise BadInputError(f"{path} does not exist.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    class SharedPrefix(HFLM):
        def _loglikelihood_tokens(self, requests: list[Any], *unused: Any, **options: Any) -> list[tuple[float, bool]]:
            return choices_log_likelihoods(self.model, [(r[1], r[2]) for r in requests], batch)

    harness = SharedPrefix(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    with tempfile.TemporaryDirectory() as cache:  # datasets would keep a copy of the questions in the user's cache
        found = simple_evaluate(harness, tasks=[_task(Path(path), cache)], limit=limit, log_samples=False)
    if found is None:  # on all but the first of several processes
        raise AssertionError("lm-eval gave no results")
    results = found["results"][TASK]
    return {name: float(results[f"{name},none"]) for name in METRICS} | {
        "questions": int(found["n-samples"][TASK]["effective"])
    }


@torch.inference_mode()
def choices_log_likelihoods(
    model: Any, requests: list[tuple[list[int], list[int]]], batch: int = BATCH
) -> list[tuple[float, bool]]:
    """For each request, a context (two tokens or more) and its continuation: the natural logarithm of the
    continuation's probability, and whether greedy decoding would give it. `batch` contexts at a time."""
    found: dict[int, tuple[float, bool]] = {}
    for contexts in _same_length(requests, batch):
        ids = torch.tensor([context for context, _ in contexts], device=model.device)
        cache = model.get_decoder()(ids[:, :-1], use_cache=True).past_key_values
        rows, places = zip(*((row, place) for row, (_, asked) in enumerate(contexts) for place in asked), strict=True)
        rows = torch.tensor(rows, device=model.device)
        cache.batch_select_indices(rows)
        continuations = [torch.tensor(requests[place][1], device=model.device) for place in places]
        fed = torch.cat([ids[rows, -1:], pad_sequence(continuations, batch_first=True)[:, :-1]], dim=1)
        logits = model(fed, past_key_values=cache, use_cache=True).logits.float()  # what follows padding is not read
        for place, said, tokens in zip(places, logits.log_softmax(-1), continuations, strict=True):
            said = said[: len(tokens)]
            greedy = bool((said.argmax(-1) == tokens).all())
            found[place] = said.gather(1, tokens[:, None]).sum().item(), greedy
    return [found[place] for place in range(len(requests))]


def _same_length(
    requests: list[tuple[list[int], list[int]]], batch: int
) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
    """Up to `batch` contexts of one length, each with the places of the requests that begin with it."""
    asked: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, (context, _) in enumerate(requests):
        asked[tuple(context)].append(place)
    by_length: dict[int, list[tuple[tuple[int, ...], list[int]]]] = defaultdict(list)
    for context, places in asked.items():
        by_length[len(context)].append((context, places))
    for length in sorted(by_length, reverse=True):
        of_length = by_length[length]
        yield from (of_length[start : start + batch] for start in range(0, len(of_length), batch))


def _task(path: Path, cache: str) -> dict[str, Any]:
    """lm-eval's arc_easy.yaml (version 1.0) with local questions."""
    question = "Question: {{question}}\nAnswer:"
    return {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(path.resolve())}, "cache_dir": cache},
        "output_type": "multiple_choice",
        "test_split": "validation",
        "num_fewshot": 0,
        "doc_to_text": question,
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "should_decontaminate": True,
        "doc_to_decontamination_query": question,
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
        "metadata": {"version": 1.0},
    }
