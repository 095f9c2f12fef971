"""What the benchmarks share: results as JSON with the machine they were measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimexport.artifacts import SCHEMA_VERSION, read_json, write_json
from slimexport.environment import environment

RESULTS = Path(__file__).parent / "results"


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier, perhaps interrupted run; none where there is no file."""
    return read_json(path)["rows"] if path.is_file() else []


def save_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_json(path, {"schema_version": SCHEMA_VERSION, "environment": environment(cuda=True), "rows": rows})


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
