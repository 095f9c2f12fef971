"""Texts in files: .txt (one running text) and .jsonl (a document a line)."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

from slimexport.errors import BadInputError, nearest
from slimexport.texts import Text

EXTENSIONS = (".txt", ".jsonl")


def file_text(path: Path, max_bytes: int) -> Text:
    """Reads at most `max_bytes` of a UTF-8 file; what lies behind is never needed and is not looked at.

    Raises BadInputError for a missing, empty, binary or wrongly encoded file, a directory, and an unknown extension.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        raise BadInputError(f"{path} is a directory: a text file ({' or '.join(EXTENSIONS)}) is needed.")
    if not path.exists():
        raise BadInputError(f"{path} does not exist.{_neighbour(path)}")
    if suffix not in EXTENSIONS:
        found = f"the extension {path.suffix!r}" if suffix else "no extension"
        raise BadInputError(f"{path} has {found}: .txt (running text) or .jsonl (field 'text') is needed.")
    try:
        with path.open("rb") as stream:
            data = stream.read(max_bytes)
            whole = not stream.read(1)
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror or error}.") from error
    content = _decode(data, whole, path)
    if not content.strip():
        raise BadInputError(f"{path} is empty: text is needed.")
    note = None if whole else f"only the first {max_bytes} bytes of the file were read"
    documents = (content,) if suffix == ".txt" else jsonl_documents(content, whole, path)
    return Text(str(path), documents, note=note)


def jsonl_documents(content: str, whole: bool, path: Path) -> tuple[str, ...]:
    """The `text` of every line, without the empty ones. A last line that was cut off (not `whole`) is left out."""
    lines = content.split("\n")  # not splitlines(): JSON strings may hold U+2028 and the like
    documents: list[str] = []
    for number, line in enumerate(lines if whole else lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise BadInputError(f"{path}, line {number} is not valid JSON: {error}.") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise BadInputError(f"{path}, line {number}: {_found(record)}; an object with a string 'text' is needed.")
        if record["text"].strip():
            documents.append(_paired(record["text"]))
    if not documents:
        raise BadInputError(f"{path} is empty: no line holds any text.")
    return tuple(documents)


def _paired(text: str) -> str:
    """With question marks for halves of characters, which JSON can hold and no tokenizer takes (`Text.sha256` too)."""
    return text.encode("utf-8", "replace").decode()


def _decode(data: bytes, whole: bool, path: Path) -> str:
    # UTF-16 is found by its NUL bytes or its byte order mark; either way it is not UTF-8
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadInputError(f"{path} is UTF-16: UTF-8 is needed (iconv -f UTF-16 -t UTF-8).")
    if (position := data.find(b"\0")) >= 0:
        raise BadInputError(f"{path} is binary (NUL byte at position {position}): UTF-8 text is needed.")
    try:
        content = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=whole)
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        raise BadInputError(
            f"{path} is not UTF-8 ({wrong}): UTF-8 text is needed, convert it (iconv -t UTF-8)."
        ) from error
    return content.replace("\r\n", "\n")


def _neighbour(path: Path) -> str:
    try:
        return nearest(path.name, [p.name for p in path.parent.iterdir() if p.suffix.lower() in EXTENSIONS])
    except OSError:
        return ""


def _found(record: object) -> str:
    if not isinstance(record, dict):
        return f"found a JSON {type(record).__name__}"
    if "text" in record:
        return f"'text' is a {type(record['text']).__name__}"
    return f"no field 'text' (found {', '.join(map(repr, list(record)[:5])) or 'nothing'})"
