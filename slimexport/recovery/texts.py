"""What is looked at, and kept, of the texts of recovery: nothing that is evaluated on is trained on, and what the model
wrote is not written again by a training that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slimexport.artifacts import CalibrationSet, Recovery, TextPart, TextSource
from slimexport.calibration import check_context, check_overlap
from slimexport.errors import BadInputError
from slimexport.recovery.domains import Domain, read_domains, read_text, save_domains, saved_domains

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from slimexport.calibration import EvaluationText
    from slimexport.config import RunConfig

TEXTS = "texts.kept"  # safetensors


def check_ahead(config: RunConfig, tokenizer: PreTrainedTokenizerBase, model: Any, evaluation: EvaluationText) -> None:
    """That a text is missing, too short, or evaluated on is said before minutes of pruning; not of what the model is
    still to write."""
    check_context(model, config.recover_length, "--recover-length")
    domains, _ = read_domains(config.recover_text, tokenizer, None, config.recover_length, config.seed)
    check_apart(domains, evaluation)


def check_apart(
    domains: Sequence[Domain], evaluation: EvaluationText, note: Callable[[str], None] | None = None
) -> bool:
    """Whether text that is evaluated on is in `domains`: an error, or where it is to be taken all the same a `note`."""
    overlaps = False
    for domain in domains:
        try:
            _check(domain.part, torch.cat([domain.train, domain.held_out]), evaluation)
        except BadInputError as error:
            if note is None:
                raise
            note(f"{error} Taken all the same: --force")
            overlaps = True
    return overlaps


def check_apart_afterwards(
    made: Recovery | None, evaluation: EvaluationText, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The same for a text that is evaluated on later, where `made` has not been checked for it: what it was trained on
    is read again. Raises BadInputError where it overlaps, or is no longer the same."""
    if made is None or made.checkpoint is None:
        return
    checked = made.settings.get("apart_from", {})
    if checked.get("sha256") == evaluation.source.sha256 and checked["tokens"] >= evaluation.source.tokens:
        return
    for part in made.texts:
        if part.written:
            continue
        text, tokens = read_text(part.name, tokenizer)
        if text.sha256 != part.sha256:
            raise BadInputError(f"The recovery text {part.name} has changed since the model was trained on it.")
        _check(part, torch.tensor(tokens)[None], evaluation)


def _check(part: TextPart, ids: torch.Tensor, evaluation: EvaluationText) -> None:
    source = TextSource(part.name, part.tokens, part.sha256)
    check_overlap(CalibrationSet(ids, source, 0), evaluation, "recovery")


def looked_at(evaluation: EvaluationText) -> dict[str, Any]:
    """For `Recovery.settings["apart_from"]`: how much of which text."""
    return {"sha256": evaluation.source.sha256, "tokens": evaluation.source.tokens}


def keep(place: Path, key: Mapping[str, Any], domains: Sequence[Domain], overlaps: bool) -> None:
    """In directory `place`, for a training made from `key`: what the model wrote of `domains`, and whether overlapping
    text was taken."""
    written = [domain for domain in domains if domain.part.written]
    save_domains(place / TEXTS, written, {"key": key, "overlaps": overlaps})


def kept(place: Path, key: Mapping[str, Any]) -> tuple[list[Domain], bool]:
    """What `keep` left for the same `key`."""
    if (place / TEXTS).is_file():
        domains, about = saved_domains(place / TEXTS)
        if about["key"] == json.loads(json.dumps(key, default=str)):
            return domains, about["overlaps"]
    return [], False
