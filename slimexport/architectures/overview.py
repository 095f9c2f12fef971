"""What `slimexport architectures` shows: every family, what of it is pruned, and how it left the conformance suite."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.artifacts import read_json

CHECKED = Path(__file__).parent / "checked.json"  # written by benchmarks/families.py
# What vLLM and llama.cpp would take of a checkpoint with layout uniform: by reading their source, nothing was run.
ELSEWHERE = Path(__file__).parent / "elsewhere.json"
GRAPHS = Path(__file__).parent / "graphs.json"  # written by benchmarks/graphs.py


@dataclass(frozen=True)
class Row:
    """What a family can lose, and where it can be read.

    `uniform`: what a checkpoint that stock transformers reads can lose; `vllm`, `llama_cpp`: how much of that these
    read, by their rules (with a star: vLLM through transformers; None: nobody looked). `exporter`: the builder of its
    graph; `slower`: how many times as long that decodes as mobius' graph of a Llama of its size, where it is traced.
    `checks`: name -> whether all models of the family that were tried passed; none where it was not tried."""

    family: str
    heads: bool
    channels: str
    uniform: str
    vllm: str | None
    llama_cpp: str | None
    exporter: str
    slower: float | None
    checks: dict[str, bool]


def overview() -> tuple[list[Row], dict[str, Any]]:
    """The rows, and the versions that the checks were run with."""
    from slimexport.targets.builders.mobius import FAMILIES

    checked = read_json(CHECKED) if CHECKED.is_file() else {"rows": [], "environment": {}}
    elsewhere = read_json(ELSEWHERE)
    slower = {row["family"]: row["decode"] for row in read_json(GRAPHS)["rows"]} if GRAPHS.is_file() else {}
    rows = []
    for name in registry.names():
        family = registry.get(name)
        own = [row for row in checked["rows"] if row["family"] == name]
        names = dict.fromkeys(check for row in own for check in row["checks"])
        results = {check: all(row["checks"].get(check, True) for row in own) for check in names}
        rows.append(
            Row(
                family=name,
                heads=family.heads_prunable,
                channels="of each expert" if family.experts else "yes",
                uniform=(uniform := _uniform(family)),
                vllm=_taken(elsewhere["vllm"]["families"].get(name), uniform),
                llama_cpp=_taken(elsewhere["llama.cpp"]["families"].get(name), uniform),
                exporter="mobius" if name in FAMILIES else "none" if family.no_trace else "transformers",
                slower=slower.get(name),
                checks=results,
            )
        )
    return rows, checked["environment"]


def _uniform(family: Family) -> str:
    if not family.channels_of_experts_alone:
        return "no"
    return "heads and channels" if family.heads_prunable and family.head_dim_field else "channels"


def _taken(said: dict[str, str] | None, uniform: str) -> str | None:
    """What of `uniform` another tool reads."""
    if said is None:
        return None
    most = said["uniform"] if uniform == "heads and channels" or said["uniform"] == "no" else uniform
    return most + ("*" if "through" in said else "")


def cells(row: Row) -> list[str]:
    failed = [check for check, passed in row.checks.items() if not passed]
    passed = f"{len(row.checks) - len(failed)} of {len(row.checks)}" if row.checks else "not tried"
    return [
        row.family, "yes" if row.heads else "no", row.channels, row.uniform, row.vllm or "–", row.llama_cpp or "–",
        row.exporter + (f" ({row.slower:.1f} x)" if row.slower else ""),
        passed + (f" (not: {', '.join(failed)})" if failed else ""),
    ]  # fmt: skip


HEAD = ["family", "heads", "channels", "layout uniform", "vLLM", "llama.cpp", "graph by", "checks passed"]


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
    read = ", ".join(of["read"] for of in read_json(ELSEWHERE).values())
    lines.append(
        f"What else reads layout uniform is known from source, not from a run: {read}; * through transformers."
    )
    return "\n".join(lines)
