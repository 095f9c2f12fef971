"""What `slimexport architectures` shows: every family, what of it is pruned, and how it left the conformance suite."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimexport.architectures import registry
from slimexport.artifacts import read_json

CHECKED = Path(__file__).parent / "checked.json"  # written by benchmarks/families.py


@dataclass(frozen=True)
class Row:
    """`uniform`: what a checkpoint that stock transformers reads can lose; `exporter`: the builder of its graph;
    `checks`: name -> whether all models of the family that were tried passed; none where it was not tried."""

    family: str
    heads: bool
    channels: str
    uniform: str
    exporter: str
    checks: dict[str, bool]


def overview() -> tuple[list[Row], dict[str, Any]]:
    """The rows, and the versions that the checks were run with."""
    from slimexport.targets.builders.mobius import FAMILIES

    checked = read_json(CHECKED) if CHECKED.is_file() else {"rows": [], "environment": {}}
    rows = []
    for name in registry.names():
        family = registry.get(name)
        own = [row for row in checked["rows"] if row["family"] == name]
        results = {check: all(row["checks"][check] for row in own) for check in (own[0]["checks"] if own else ())}
        rows.append(
            Row(
                family=name,
                heads=family.heads_prunable,
                channels="of each expert" if family.experts else "yes",
                uniform="heads and channels" if family.heads_prunable and family.head_dim_field else "channels",
                exporter="mobius" if name in FAMILIES else "transformers",
                checks=results,
            )
        )
    return rows, checked["environment"]


def cells(row: Row) -> list[str]:
    failed = [check for check, passed in row.checks.items() if not passed]
    passed = f"{len(row.checks) - len(failed)} of {len(row.checks)}" if row.checks else "not tried"
    return [
        row.family, "yes" if row.heads else "no", row.channels, row.uniform, row.exporter,
        passed + (f" (not: {', '.join(failed)})" if failed else ""),
    ]  # fmt: skip


HEAD = ["family", "heads", "channels", "layout uniform", "graph by", "checks passed"]


def text(rows: list[Row], environment: dict[str, Any]) -> str:
    """A table for terminals."""
    table = [HEAD, *map(cells, rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    versions = environment.get("packages", {})
    if versions:
        named = ", ".join(
            f"{name} {versions[name]}" for name in ("transformers", "torch", "onnxruntime") if name in versions
        )
        lines.append(f"\nChecked with {named}: slimexport.testing.")
    return "\n".join(lines)
