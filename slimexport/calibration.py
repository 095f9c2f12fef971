"""Calibration and evaluation texts as token ids, and the guarantee that they do not overlap.

Calibration windows are chosen by the seed, spread evenly over all the text there is; the evaluation text is always
its first tokens, so that two runs with different seeds are measured on the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.artifacts import CalibrationSet, TextSource
from slimexport.errors import BadInputError
from slimexport.texts import Text
from slimexport.texts.wikipedia import Part

if TYPE_CHECKING:
    import numpy as np
    import torch

    from slimexport.config import RunConfig

OVERLAP_WINDOW = 32  # tokens
OVERLAP_SHARE = 0.01  # of the evaluation's windows; stock phrases do occur in two honest texts


@dataclass(frozen=True)
class EvaluationText:
    """`input_ids` is int64 [tokens], without special tokens; `source.tokens` is its length."""

    input_ids: torch.Tensor
    source: TextSource


# ------------------------------------------------------------------------------------------------------- the stages


def calibrate(
    config: RunConfig,
    tokenizer: Any,
    model: Any = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> CalibrationSet:
    """Reads `config.calibration` and returns floor(calibration_tokens / sequence_length) sequences, at least one.

    `input_ids` is int64 [sequences, sequence_length]. Windows do not overlap, keep the order of the text, and are
    spread over it by `config.seed`. `model` is needed for `self` only; where given, its context length is checked;
    `progress` is told of the sequences it sampled. Raises BadInputError for texts that are missing, unreadable, too
    short, or those of `config.eval_text`.
    """
    import torch

    length = config.sequence_length
    count = max(1, config.calibration_tokens // length)
    _refuse_same(config.calibration, config.eval_text)
    _check_context(model, length)
    if config.calibration == "self":
        from slimexport.texts import generated

        if model is None:
            raise ValueError("calibrate() needs the model for --calibration self")
        ids = generated.sample(model, tokenizer, count, length, config.seed, progress)
        written = Text("self", (tokenizer.decode(ids.flatten()),), note=generated.NOTE)
        return CalibrationSet(ids, _source(written, ids.numel()), config.seed)

    text = _read(config.calibration, "calibration", count * length)
    tokens = _pack(text, tokenizer)
    _check_tokens(tokens, tokenizer, text.name)
    windows = len(tokens) // length
    if windows < count:
        raise BadInputError(
            f"{text.name} is too short: found {len(tokens)} tokens, need {count * length}. "
            f"Give more text, or lower --calibration-tokens to {windows * length}."
            if windows
            else f"{text.name} is too short: found {len(tokens)} tokens, need at least one sequence of {length}. "
            "Give more text, or lower --sequence-length and --calibration-tokens."
        )
    grid = torch.tensor(tokens[: windows * length], dtype=torch.int64).view(windows, length)
    ids = grid[spread(windows, count, config.seed)]
    return CalibrationSet(ids, _source(text, ids.numel()), config.seed)


def evaluation_ids(config: RunConfig, tokenizer: Any, calibration: TextSource | None) -> EvaluationText:
    """The first `config.eval_tokens` tokens of `config.eval_text`, fewer where the text ends before.

    `input_ids` is int64 [tokens]; the text is tokenised in one go and gets no special tokens. `calibration` is the
    text that the model was calibrated on, None where it was not. Raises BadInputError for texts that are missing,
    unreadable, shorter than one `eval_window`, or the calibration text itself.
    """
    import torch

    if config.eval_text == "self":
        raise BadInputError("--eval-text self: a model cannot be judged by its own text; give a file, or default.")
    if calibration is not None:
        _refuse_same(calibration.name, config.eval_text)
    text = _read(config.eval_text, "evaluation", config.eval_tokens)
    source = _source(text, 0)
    if calibration is not None and calibration.sha256 == source.sha256:
        raise BadInputError(
            f"{text.name} and the calibration text {calibration.name} are the same text "
            f"(sha256 {source.sha256[:12]}...): evaluate on a text that was not calibrated on."
        )
    tokens = _tokenize(tokenizer, text.joined)[: config.eval_tokens]
    _check_tokens(tokens, tokenizer, text.name)
    needed = min(config.eval_tokens, config.eval_window)
    if len(tokens) < needed:
        raise BadInputError(
            f"{text.name} is too short: found {len(tokens)} tokens, need {needed} (one --eval-window). "
            "Give more text, or lower --eval-window."
        )
    return EvaluationText(torch.tensor(tokens, dtype=torch.int64), replace(source, tokens=len(tokens)))


def check_overlap(calibration: CalibrationSet, evaluation: EvaluationText) -> None:
    """Raises BadInputError where more than 1 % of the evaluation's 32-token windows occur in the calibration ids.

    The evaluation's windows do not overlap each other; the calibration ids are searched at every position.
    """
    import numpy as np

    parts = evaluation.input_ids.numpy()
    parts = parts[: len(parts) // OVERLAP_WINDOW * OVERLAP_WINDOW].reshape(-1, OVERLAP_WINDOW)
    ids = calibration.input_ids.numpy().reshape(-1)
    if not len(parts) or len(ids) < OVERLAP_WINDOW:
        return
    everywhere = np.lib.stride_tricks.sliding_window_view(ids, OVERLAP_WINDOW)
    found = int(np.isin(_hashes(parts), _hashes(everywhere)).sum())
    if found > OVERLAP_SHARE * len(parts):
        raise BadInputError(
            f"{found} of the {len(parts)} windows of {OVERLAP_WINDOW} tokens in {evaluation.source.name} also occur in "
            f"the calibration text {calibration.source.name} ({found / len(parts):.1%}, at most {OVERLAP_SHARE:.0%} "
            "may): evaluate on a text that was not calibrated on."
        )


def spread(available: int, count: int, seed: int) -> list[int]:
    """`count` indices below `available`, ascending and different: one drawn from each of `count` equal stretches."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    edges = [i * available // count for i in range(count + 1)]
    draws = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    return [a + int(u * (b - a)) for a, b, u in zip(edges[:-1], edges[1:], draws, strict=True)]


# ------------------------------------------------------------------------------------------------------ text to ids


def _read(spec: str, part: Part, tokens: int) -> Text:
    # A corpus of gigabytes is not tokenised for 64 windows; 40 characters a token is far more than any text needs.
    limit = max(4_000_000, 40 * tokens)
    if spec == "default":
        from slimexport.texts.wikipedia import default_text

        return default_text(part)
    if spec.startswith("dataset:"):
        from slimexport.texts.hub import dataset_text

        return dataset_text(spec, limit)
    from slimexport.texts.files import file_text

    return file_text(Path(spec).expanduser(), limit)


def _source(text: Text, tokens: int) -> TextSource:
    return TextSource(text.name, tokens, text.sha256, text.license, text.note)


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: the warning that the text is longer than the model's context is meant for prompts
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _pack(text: Text, tokenizer: Any) -> list[int]:
    """Running text as it is; documents one after another, each ended as in pretraining (eos, else bos)."""
    if len(text.documents) == 1:
        return _tokenize(tokenizer, text.documents[0])
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    encoded = tokenizer(list(text.documents), add_special_tokens=False, verbose=False)["input_ids"]
    return [token for ids in encoded for token in (*ids, *(() if end is None else (end,)))]


def _hashes(windows: np.ndarray) -> np.ndarray:
    """uint64 [n] of int64 [n, OVERLAP_WINDOW], by Horner's rule modulo 2**64."""
    import numpy as np

    total = np.zeros(len(windows), dtype=np.uint64)
    for column in range(windows.shape[1]):
        total = total * np.uint64(0x9E3779B97F4A7C15) + windows[:, column].astype(np.uint64) + np.uint64(1)
    return total


# ------------------------------------------------------------------------------------------------------------ checks


def _check_tokens(tokens: list[int], tokenizer: Any, name: str) -> None:
    if not tokens:
        raise BadInputError(f"{name} is empty: the tokenizer makes no tokens of it, text is needed.")
    if set(tokens) <= set(tokenizer.all_special_ids):
        raise BadInputError(
            f"{name} holds nothing but special tokens ({tokenizer.decode(tokens[:1])}): text is needed."
        )


def _check_context(model: Any, length: int) -> None:
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise BadInputError(f"--sequence-length {length} is more than the model's context of {limit} tokens.")


def _refuse_same(calibration: str, evaluation: str) -> None:
    """`default` for both is fine: it is split by article."""
    same = calibration == evaluation != "default"
    if not same and all(Path(spec).expanduser().is_file() for spec in (calibration, evaluation)):
        same = Path(calibration).expanduser().samefile(Path(evaluation).expanduser())
    if same:
        raise BadInputError(
            f"{evaluation} is both the calibration and the evaluation text: give another --eval-text, or default."
        )
