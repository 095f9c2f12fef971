"""What stands behind the name of a text: the ones that come with us, the model, files, Hub datasets."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from slimexport.texts import Part, Text

if TYPE_CHECKING:
    import torch

    from slimexport.texts.generated import Progress

SPLIT = ("wikipedia", "news", "code")  # have a part for calibration and another for evaluation
READ = (*SPLIT, "questions")
WRITTEN = ("chat", "self")  # by the model
NAMES = (*READ, *WRITTEN)


def read(spec: str, part: Part, tokens: int) -> Text:
    """The text of a name in `READ`, a file or a `dataset:`, of which about `tokens` tokens are needed.

    Raises BadInputError for what is missing or unreadable.
    """
    if spec == "wikipedia":
        from slimexport.texts.wikipedia import default_text

        return default_text(part)
    if spec == "news":
        from slimexport.texts.news import news_text

        return news_text(part)
    if spec == "code":
        from slimexport.texts.standard_library import code_text

        return code_text(part)
    if spec == "questions":
        from slimexport.texts.questions import questions_text

        return questions_text()
    # A corpus of gigabytes is not tokenised for 64 windows; 40 characters a token is far more than any text needs.
    limit = max(4_000_000, 40 * tokens)
    if spec.startswith("dataset:"):
        from slimexport.texts.hub import dataset_text

        return dataset_text(spec, limit)
    from slimexport.texts.files import file_text

    return file_text(Path(spec).expanduser(), limit)


def write(
    name: str, model: Any, tokenizer: Any, sequences: int, length: int, seed: int, progress: Progress
) -> tuple[torch.Tensor, Text]:
    """int64 [sequences, length] of a name in `WRITTEN`, and the same as a text.

    Raises BadInputError where this model cannot write it.
    """
    writer = _writer(name)
    ids = writer.sample(model, tokenizer, sequences, length, seed, progress)
    return ids, Text(name, (tokenizer.decode(ids.flatten()),), note=writer.NOTE)


def unable(name: str, tokenizer: Any) -> str | None:
    """Why a name in `WRITTEN` cannot be written with this tokenizer; None where it can."""
    return _writer(name).unable(tokenizer)


def _writer(name: str) -> ModuleType:
    from slimexport.texts import chat, generated

    return {"chat": chat, "self": generated}[name]
