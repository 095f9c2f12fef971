"""The texts of the quality benchmark as token ids: what models are calibrated on, tuned on, and measured on.

The three kinds share no text, with one exception that is said below. `data` is the directory that holds
`wikitext2/wiki.test.txt`, `wikitext2/wiki.test.raw`, `wikitext2/calibration.txt` and `arc/arc_easy_validation.jsonl`;
the other texts come out of the gensim wheel (`pip install --no-deps gensim==4.4.0`), of which nothing is imported.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from slimexport.errors import BadInputError
from slimexport.texts.wikipedia import INSTALL, default_text, wheel_file

WINDOW = 512
EVALUATION_TOKENS = 60_000  # of WikiText-2's test split
RAW_TOKENS = 20_000  # of the same split as the file has it: a shifted text among others
ARTICLES = slice(20_000, 40_000)  # of the excerpt's evaluation part; its beginning is development text
ARC_TOKENS = 20_000
NEWS = "lee.cor"
CALIBRATION_WINDOWS = 128
# With a seed: windows of the first 60,000 tokens, so that the last 7,600 of the file are free for development.
SEEDED_POOL, SEEDED_WINDOWS = 60_000 // WINDOW, 64
DEVELOPMENT_TOKENS = 7_600


def evaluation_texts(tokenizer: Any, data: Path, tokens: int = EVALUATION_TOKENS) -> dict[str, torch.Tensor]:
    """What the quality table is measured on, and nothing else is: name -> int64 [tokens], no special tokens.

    `wikitext2`      the first `tokens` of WikiText-2's test split as natural text: the same kind as the calibration
    `wikitext2-raw`  the first 20,000 tokens of the same split with its ` @-@ ` and ` , `
    `articles`       tokens 20,000 to 40,000 of the held-out articles in gensim's Wikipedia excerpt
    `arc`            ARC-Easy questions, each with its correct answer, a paragraph each; the first 20,000 tokens
    `news`           gensim's Lee corpus of news, all of it (5,101 tokens with SmolLM2's tokenizer)

    Raises BadInputError where a file is missing or too short.
    """
    wikitext = Path(data) / "wikitext2"
    return {
        "wikitext2": _part(_ids(tokenizer, _read(wikitext / "wiki.test.txt")), slice(tokens), "wiki.test.txt"),
        "wikitext2-raw": _part(
            _ids(tokenizer, _read(wikitext / "wiki.test.raw")), slice(min(tokens, RAW_TOKENS)), "wiki.test.raw"
        ),
        "articles": _part(_ids(tokenizer, default_text("evaluation").joined), ARTICLES, "the Wikipedia excerpt"),
        "arc": _ids(tokenizer, arc_text(Path(data) / "arc" / "arc_easy_validation.jsonl"))[:ARC_TOKENS],
        "news": _ids(tokenizer, _read(gensim_file(NEWS), "latin-1")),  # for its one pound sign
    }


def development_texts(tokenizer: Any, data: Path) -> dict[str, torch.Tensor]:
    """What settings may be chosen on: name -> int64 [tokens].

    `wikitext2` is the last 7,600 tokens of the calibration file, `articles` the first 20,000 of the held-out articles.
    The main calibration (`calibration_windows` without a seed) reaches into the first of them: tune with a seed.
    """
    calibration = _ids(tokenizer, _read(Path(data) / "wikitext2" / "calibration.txt"))
    articles = _ids(tokenizer, default_text("evaluation").joined)
    return {
        "wikitext2": _part(calibration, slice(len(calibration) - DEVELOPMENT_TOKENS, len(calibration)), "calibration"),
        "articles": _part(articles, slice(ARTICLES.start), "the Wikipedia excerpt"),
    }


def calibration_windows(
    tokenizer: Any, data: Path, seed: int | None = None, windows: int | None = None
) -> torch.Tensor:
    """int64 [windows, 512] of WikiText-2 validation sentences, ascending in the text.

    Without a seed: the first `windows` (default 128, 65,536 tokens), in order. With a seed: `windows` (default 64)
    drawn without replacement from the 117 in the first 60,000 tokens: what a repetition with another seed varies.
    Raises BadInputError where there are not that many.
    """
    ids = _ids(tokenizer, _read(Path(data) / "wikitext2" / "calibration.txt"))
    available = len(ids) // WINDOW if seed is None else min(len(ids) // WINDOW, SEEDED_POOL)
    wanted = windows or (CALIBRATION_WINDOWS if seed is None else SEEDED_WINDOWS)
    if wanted > available:
        raise BadInputError(f"calibration.txt gives {available} windows of {WINDOW} tokens, {wanted} are needed.")
    grid = ids[: available * WINDOW].view(available, WINDOW)
    if seed is None:
        return grid[:wanted].clone()
    drawn = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted]
    return grid[drawn.sort().values]


def arc_text(path: Path) -> str:
    """ARC questions (the `allenai/ai2_arc` layout, JSONL) with their correct answers, one a paragraph."""
    rows = [json.loads(line) for line in _read(path).splitlines() if line.strip()]
    answers = [row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])] for row in rows]
    return "\n\n".join(f"{row['question']} {answer}" for row, answer in zip(rows, answers, strict=True))


def gensim_file(name: str) -> Path:
    """A file of gensim's test data, in the installed distribution; raises BadInputError with the command to get it."""
    path = wheel_file(re.escape(name))
    if path is not None:
        return path
    raise BadInputError(f"{name} lives in the gensim wheel, which is not installed here: {INSTALL}")


def _read(path: Path, encoding: str = "utf-8") -> str:
    if not path.is_file():
        raise BadInputError(f"{path} does not exist.")
    return path.read_text(encoding=encoding)


def _ids(tokenizer: Any, text: str) -> torch.Tensor:
    # verbose=False: the warning that the text is longer than the model's context is meant for prompts
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def _part(ids: torch.Tensor, wanted: slice, name: str) -> torch.Tensor:
    if wanted.stop > len(ids) or (wanted.start or 0) < 0:
        raise BadInputError(f"{name} has {len(ids)} tokens, {wanted.stop} are needed.")
    return ids[wanted].clone()
