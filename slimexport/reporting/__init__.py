"""The report: report.json (every number), report.md, report.html, junit.xml, and the lines on the terminal."""

from __future__ import annotations

from pathlib import Path

from slimexport.artifacts import staged_directory, write_json, write_text
from slimexport.reporting import html, junit, markdown
from slimexport.reporting.schema import (
    JSON_NAME,
    BlockSummary,
    PruningSummary,
    Report,
    load_report,
    to_json,
)
from slimexport.reporting.terminal import (
    checkpoint_text,
    exports_text,
    figures_text,
    plan_text,
    recovery_text,
    summary,
    verified_text,
)

__all__ = [
    "BlockSummary", "PruningSummary", "Report", "checkpoint_text", "exports_text", "figures_text", "load_report",
    "plan_text", "recovery_text", "summary", "to_json", "verified_text", "write_report",
]  # fmt: skip


def write_report(report: Report, directory: Path) -> None:
    """Writes report.json, report.md, report.html and junit.xml; `directory` (out/report) is replaced as a whole."""
    with staged_directory(Path(directory)) as place:
        write_json(place / JSON_NAME, to_json(report))
        write_text(place / "report.md", markdown.render(report))
        write_text(place / "report.html", html.render(report))
        write_text(place / "junit.xml", junit.render(report))
