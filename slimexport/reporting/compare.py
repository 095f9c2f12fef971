"""Several runs beside each other: one column a run, one row a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimexport.reporting import markdown, page, terminal, view
from slimexport.reporting.schema import Report

_FIRST = ("accuracy.", "task.", "prefill.", "decode.", "size.", "load.", "memory.")
LEGEND = (
    "In brackets the ratio to the dense model, interleaved with it in one run; times of different runs were measured "
    "one after the other, perhaps on different machines."
)


def different(reports: Mapping[str, Report]) -> list[str]:
    """What makes columns hard to compare: other models, texts or machines."""
    made = []
    for what, of in (
        ("models", {name: report.source.fingerprint[:12] for name, report in reports.items()}),
        (
            "evaluation texts",
            {name: r.evaluation.sha256[:12] if r.evaluation else "none" for name, r in reports.items()},
        ),
        ("machines", {name: str(report.environment.get("cpu")) for name, report in reports.items()}),
    ):
        if len(set(of.values())) > 1:
            made.append(f"These are different {what}: {', '.join(f'{name} {value}' for name, value in of.items())}.")
    return made


def heads(reports: Mapping[str, Report]) -> tuple[str, ...]:
    return ("", *reports)


def rows(reports: Mapping[str, Report]) -> list[tuple[str, ...]]:
    """Figures of the first export of every run, those that people look for first; then what was removed."""
    made = [
        ("verdict", *(report.headline.partition(":")[0] for report in reports.values())),
        ("ratio", *(f"{report.plan.ratio:.4g}" for report in reports.values())),
        ("criterion", *(report.plan.criterion for report in reports.values())),
        ("allocation", *(report.plan.allocation for report in reports.values())),
        ("parameters", *(view.number(report.plan.estimates.parameters) for report in reports.values())),
    ]
    names = dict.fromkeys(f.name for report in reports.values() for f in report.verification.figures)
    for name in sorted(
        names, key=lambda name: next((i for i, p in enumerate(_FIRST) if name.startswith(p)), len(_FIRST))
    ):
        made.append((name, *(_cell(report, name) for report in reports.values())))
    return made


def _cell(report: Report, name: str) -> str:
    figure = report.verification.figure(name)
    if figure is None:
        return view.DASH
    if not figure.valid:
        return "invalid"
    return view.number(figure.shrunk) + (f" ({figure.ratio:.3f})" if figure.ratio is not None else "")


def to_text(reports: Mapping[str, Report]) -> str:
    return "\n".join([terminal.table(heads(reports), rows(reports)), LEGEND, *different(reports)])


def to_markdown(reports: Mapping[str, Report]) -> str:
    table = markdown.table(heads(reports), rows(reports), right=range(1, 1 + len(reports)))
    return "\n\n".join([table, LEGEND, *map(markdown.text, different(reports))]) + "\n"


def to_html(reports: Mapping[str, Report]) -> str:
    table = page.table(heads(reports), rows(reports), right=range(1, 1 + len(reports)))
    body = page.section("Runs", page.scroll(table), page.soft(LEGEND), page.bullets(different(reports)))
    return page.page(f"Comparison of {len(reports)} runs", [body])


def to_json(reports: Mapping[str, Report]) -> dict[str, Any]:
    from slimexport.reporting.schema import to_json as whole

    return {"reports": {name: whole(report) for name, report in reports.items()}, "different": different(reports)}
