"""Calibration and evaluation texts as token ids, and the guarantee that they do not overlap.

Calibration windows are chosen by the seed, spread evenly over all the text there is; the evaluation text is always
its first tokens, so that two runs with different seeds are measured on the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.artifacts import CalibrationSet, TextSource
from slimexport.errors import BadInputError
from slimexport.texts import Text, mix, sources
from slimexport.texts.windows import check_tokens, grid, pack, spread, tokenize

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

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
    spread over it by `config.seed`; those of a mix take turns, and its sha256 is that of `input_ids` (little-endian).
    `model` is needed for what it writes: `self` and `chat`; a mix without it lacks those sequences and is otherwise the
    same. Where it is given its context length is checked; `progress` is told of what it wrote. Raises BadInputError for
    texts that are missing, unreadable, too short, or those of `config.eval_text`.
    """
    length = config.sequence_length
    count = max(1, config.calibration_tokens // length)
    _refuse_same(config.calibration, config.eval_text)
    check_context(model, length, "--sequence-length")
    if mix.is_mix(config.calibration):
        mixed = mix.mixed(config.calibration, tokenizer, model, count, length, config.seed, progress)
        ids = mixed.input_ids
        digest = hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
        source = TextSource(mixed.name, ids.numel(), digest, mixed.license, mixed.note, mixed.parts)
        return CalibrationSet(ids, source, config.seed)
    if config.calibration in sources.WRITTEN:
        if model is None:
            raise ValueError(f"calibrate() needs the model for --calibration {config.calibration}")
        ids, text = sources.write(config.calibration, model, tokenizer, count, length, config.seed, progress)
        return CalibrationSet(ids, _source(text, ids.numel()), config.seed)

    text = sources.read(config.calibration, "calibration", count * length)
    tokens = pack(text, tokenizer)
    check_tokens(tokens, tokenizer, text.name)
    windows = len(tokens) // length
    if windows < count:
        raise BadInputError(
            f"{text.name} is too short: found {len(tokens)} tokens, need {count * length}. "
            f"Give more text, or lower --calibration-tokens to {windows * length}."
            if windows
            else f"{text.name} is too short: found {len(tokens)} tokens, need at least one sequence of {length}. "
            "Give more text, or lower --sequence-length and --calibration-tokens."
        )
    ids = grid(tokens, length)[spread(windows, count, config.seed)]
    return CalibrationSet(ids, _source(text, ids.numel()), config.seed)


def rounding_windows(config: RunConfig, tokenizer: Any) -> NDArray[np.int64] | None:
    """int64 [sequences, sequence_length]: the text by which weights of 4 bits are rounded (`targets/quantise/gptq.py`).

    It is `config.rounding_tokens` of the calibration text, without what the model would have to write for it; where
    that is all, the default text. None where the config asks for none. Raises BadInputError as `calibrate` does.
    """
    if not config.rounding_tokens:
        return None
    spec = "default" if mix.written(config.calibration) else config.calibration
    fewer = config.model_copy(update={"calibration": spec, "calibration_tokens": config.rounding_tokens})
    try:
        windows: NDArray[np.int64] = calibrate(fewer, tokenizer).input_ids.numpy()
    except BadInputError as error:
        raise BadInputError(str(error).replace("--calibration-tokens", "--rounding-tokens")) from error
    return windows


def evaluation_ids(config: RunConfig, tokenizer: Any, calibration: TextSource | None) -> EvaluationText:
    """The first `config.eval_tokens` tokens of `config.eval_text`, fewer where the text ends before.

    `input_ids` is int64 [tokens]; the text is tokenised in one go and gets no special tokens. `calibration` is the
    text that the model was calibrated on, None where it was not. Raises BadInputError for texts that are missing,
    unreadable, shorter than one `eval_window`, or the calibration text itself.
    """
    import torch

    spec = _evaluation_spec(config.eval_text)
    if calibration is not None:
        _refuse_same(calibration.name, config.eval_text)
    text = sources.read(spec, "evaluation", config.eval_tokens)
    source = _source(text, 0)
    if calibration is not None and source.sha256 in (calibration.sha256, *calibration.read):
        raise BadInputError(
            f"{text.name} and the calibration text {calibration.name} are the same text "
            f"(sha256 {source.sha256[:12]}...): evaluate on a text that was not calibrated on."
        )
    tokens = tokenize(tokenizer, text.joined)[: config.eval_tokens]
    check_tokens(tokens, tokenizer, text.name)
    needed = min(config.eval_tokens, config.eval_window)
    if len(tokens) < needed:
        raise BadInputError(
            f"{text.name} is too short: found {len(tokens)} tokens, need {needed} (one --eval-window). "
            "Give more text, or lower --eval-window."
        )
    return EvaluationText(torch.tensor(tokens, dtype=torch.int64), replace(source, tokens=len(tokens)))


def check_overlap(calibration: CalibrationSet, evaluation: EvaluationText, use: str = "calibration") -> None:
    """Raises BadInputError where more than 1 % of the evaluation's 32-token windows occur in the calibration ids.

    `use` is what those are for, in the message.
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
            f"the {use} text {calibration.source.name} ({found / len(parts):.1%}, at most {OVERLAP_SHARE:.0%} "
            f"may): evaluate on a text that {'was not calibrated on' if use == 'calibration' else 'is not trained on'}."
        )


# ------------------------------------------------------------------------------------------------------ text to ids


def _source(text: Text, tokens: int) -> TextSource:
    return TextSource(text.name, tokens, text.sha256, text.license, text.note)


def _hashes(windows: np.ndarray) -> np.ndarray:
    """uint64 [n] of int64 [n, OVERLAP_WINDOW], by Horner's rule modulo 2**64."""
    import numpy as np

    total = np.zeros(len(windows), dtype=np.uint64)
    for column in range(windows.shape[1]):
        total = total * np.uint64(0x9E3779B97F4A7C15) + windows[:, column].astype(np.uint64) + np.uint64(1)
    return total


# ------------------------------------------------------------------------------------------------------------ checks


def _evaluation_spec(spec: str) -> str:
    """Where the evaluation text is read: `default` is Wikipedia. Raises BadInputError for what none can be."""
    if spec in sources.WRITTEN:
        raise BadInputError(f"--eval-text {spec}: a model cannot be judged by its own text; give a file, or default.")
    if spec == "questions" or spec.startswith(mix.PREFIX):
        raise BadInputError(
            f"--eval-text {spec}: one text is needed: a file, default, {', '.join(sources.SPLIT[:-1])} or "
            f"{sources.SPLIT[-1]} (of these a part is kept for evaluation)."
        )
    return "wikipedia" if spec == "default" else spec


def check_context(model: Any, length: int, flag: str) -> None:
    """Raises BadInputError where the model has fewer positions than `length`, which `flag` asks for."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise BadInputError(f"{flag} {length} is more than the model's context of {limit} tokens.")


def _refuse_same(calibration: str, evaluation: str) -> None:
    """What comes with us may be both: it is split by article, story or module."""
    specs = tuple(mix.parse(calibration)) if mix.is_mix(calibration) else (calibration,)
    same = evaluation in specs and evaluation not in ("default", *sources.SPLIT)
    path = Path(evaluation).expanduser()
    if not same and path.is_file():
        files = (Path(spec).expanduser() for spec in specs)
        same = any(file.is_file() and file.samefile(path) for file in files)
    if same:
        raise BadInputError(
            f"{evaluation} is both the calibration and the evaluation text: give another --eval-text, or default."
        )
