"""ARC-Easy with lm-eval, offline, on a torch model in memory.

pip install lm-eval==0.4.13
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from slimexport.errors import BadInputError

TASK = "arc_easy_local"
BATCH = 16  # requests are sorted by length, so little of a batch is padding
METRICS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


def arc_easy(model: Any, tokenizer: Any, path: Path, limit: int | None = None, batch: int = BATCH) -> dict[str, Any]:
    """`acc`, `acc_norm` (log-likelihood per character), their standard errors, and `questions`; zero-shot.

    `path` is a JSONL file in the layout of `allenai/ai2_arc`. Prompt, choices and metrics are those of lm-eval's own
    `arc_easy`; only where the questions come from differs. `limit` takes the first questions. Raises BadInputError
    where lm-eval or the file is missing.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise BadInputError("The task needs: pip install lm-eval==0.4.13") from None
    if not Path(path).is_file():
        raise BadInputError(f"{path} does not exist.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    with tempfile.TemporaryDirectory() as cache:  # datasets would keep a copy of the questions in the user's cache
        found = simple_evaluate(harness, tasks=[_task(Path(path), cache)], limit=limit, log_samples=False)
    if found is None:  # on all but the first of several processes
        raise AssertionError("lm-eval gave no results")
    results = found["results"][TASK]
    return {name: float(results[f"{name},none"]) for name in METRICS} | {
        "questions": int(found["n-samples"][TASK]["effective"])
    }


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
