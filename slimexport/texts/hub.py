"""Texts from datasets of the Hugging Face Hub (or a local directory in that format)."""

from __future__ import annotations

from typing import Any

from slimexport.errors import BadInputError, nearest
from slimexport.texts import Text

PREFIX = "dataset:"


def dataset_text(spec: str, max_characters: int) -> Text:
    """`dataset:NAME[:CONFIG[:SPLIT[:COLUMN]]]`; empty parts mean the default configuration, `train`, `text`.

    Reads rows until `max_characters`. Code that comes with a dataset is never run. Raises BadInputError where the
    `datasets` library, the dataset, the split or the column is missing, or the column does not hold strings.
    """
    name, config, split, column = _parse(spec)
    dataset = _load(spec, name, config, split)
    if column not in dataset.column_names:
        known = ", ".join(dataset.column_names)
        raise BadInputError(f"{spec}: no column {column!r}, found {known}.{nearest(column, dataset.column_names)}")
    rows: list[str] = []
    size = 0
    for row in dataset.select_columns([column]):
        value = row[column]
        if value is not None and not isinstance(value, str):
            raise BadInputError(f"{spec}: column {column!r} holds {type(value).__name__}, strings are needed.")
        rows.append(value or "")
        size += len(rows[-1])
        if size >= max_characters:
            break
    documents = _documents(rows)
    if not documents:
        raise BadInputError(f"{spec} is empty: no row of column {column!r} holds any text.")
    card = getattr(dataset.info, "license", "") or None
    note = f"the first {len(rows)} of {len(dataset)} rows" if len(rows) < len(dataset) else None
    return Text(spec, documents, license=card, note=note)


def _parse(spec: str) -> tuple[str, str | None, str, str]:
    parts = spec.removeprefix(PREFIX).split(":")
    if len(parts) > 4 or not parts[0].strip():
        raise BadInputError(f"{spec!r} is not of the form dataset:NAME[:CONFIG[:SPLIT[:COLUMN]]].")
    name, config, split, column = (part.strip() for part in (*parts, "", "", "")[:4])
    return name, config or None, split or "train", column or "text"


def _load(spec: str, name: str, config: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise BadInputError(f"{spec} needs the datasets library: pip install 'slimexport[datasets]'.") from None
    # The library has its own zoo of exceptions (network, split, configuration, files): all mean the same here.
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadInputError(f"{spec} cannot be loaded: {reason}") from error


def _documents(rows: list[str]) -> tuple[str, ...]:
    """Rows are documents, unless many are blank: then they are the lines of running text (wikitext is stored so)."""
    filled = tuple(row for row in rows if row.strip())
    if not filled or len(rows) - len(filled) <= 0.1 * len(rows):
        return filled
    return ("\n".join(row.rstrip("\n") for row in rows).strip(),)
