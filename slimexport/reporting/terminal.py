"""What the commands print on stdout for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from slimexport.artifacts import (
    ExportArtifact,
    PruningCost,
    PruningPlan,
    Recovery,
    ShrunkCheckpoint,
    VerificationReport,
)
from slimexport.progress import seconds
from slimexport.reporting import view
from slimexport.reporting.schema import Report


def summary(report: Report, directory: Path | None = None) -> str:
    """The lines at the end of `slimexport run`: verdict, figures, and where the report lies."""
    first, _ = view.tables(report)
    lines = [report.verdict, view.sentence(report), "", _figures(first), *_invalid(report.verification)]
    if several := view.exports(report):
        lines += ["", table(view.EXPORT_COLUMNS, several), view.EXPORT_LEGEND]
    if directory is not None:
        lines += ["", f"report: {directory / 'report.md'} (also .html, .json, junit.xml)"]
    return "\n".join(lines)


def plan_text(plan: PruningPlan) -> str:
    """Sizes of every block, what they save, and the notes (memory, time)."""
    head = (
        f"{plan.model_type}: {view.percent(plan.ratio)} of the block linear parameters removed "
        f"({view.percent(plan.ratio_asked)} asked), criterion {plan.criterion}, allocation {plan.allocation}, "
        f"layout {plan.layout}"
    )
    lines = [head, "", table(view.BLOCK_COLUMNS[:4], view.sizes(plan)), ""]
    lines += [table(view.REMOVED_COLUMNS, view.removed(plan)), ""]
    lines.append(view.ideal_speedups(plan.dense_estimates, plan.estimates))
    if plan.cost:
        lines.append(
            f"pruning takes about {seconds(plan.cost.seconds)} on {plan.cost.device} "
            f"({plan.cost.flops / 1e12:.3g} TFLOP, {plan.cost.flops_per_second / 1e9:.3g} GFLOP/s measured now) "
            f"and {_memory(plan.cost)}"
        )
    return "\n".join([*lines, *plan.notes])


def _memory(cost: PruningCost) -> str:
    parts = [f"{cost.peak_memory_bytes / 1e9:.1f} GB of memory"]
    if cost.peak_device_memory_bytes:
        parts.append(f"{cost.peak_device_memory_bytes / 1e9:.1f} GB of device memory")
    where = {"host": ", hidden states in the memory of the host", "file": ", hidden states in a file"}
    return f"{', '.join(parts)}, {cost.disk_bytes / 1e9:.1f} GB of disk{where.get(cost.hidden_states, '')}"


def checkpoint_text(checkpoint: ShrunkCheckpoint, output: Path) -> str:
    return (
        f"{output / checkpoint.path}: {checkpoint.parameters:,} parameters, {checkpoint.bytes / 1e6:,.1f} MB; "
        f"reloaded in a fresh process, largest logit difference {view.number(checkpoint.max_logit_difference)}"
    )


def recovery_text(made: Recovery, output: Path) -> str:
    lines = [view.recovery_sentence(made), "", table(view.RECOVERY_COLUMNS, view.recovery(made)), *made.notes]
    if made.checkpoint is not None:
        lines += ["", checkpoint_text(made.checkpoint, output)]
    return "\n".join(lines)


def exports_text(exports: Mapping[str, ExportArtifact]) -> str:
    lines = []
    for name, made in exports.items():
        lines.append(f"{name}: {made.path} ({made.target}, {made.builder}, {made.precision}, {made.provider})")
        lines += [f"  {note}" for note in made.notes]
    return "\n".join(lines)


def verified_text(reports: Mapping[str, VerificationReport]) -> str:
    """The figures of every export, under its name where there are several."""
    if len(reports) == 1:
        return figures_text(next(iter(reports.values())))
    return "\n\n".join(f"{name}\n{figures_text(of)}" for name, of in reports.items())


def figures_text(report: VerificationReport) -> str:
    return "\n".join([_figures(view.figure_rows(report)), *view.invalid(report), *report.notes])


def _invalid(report: VerificationReport) -> list[str]:
    """Why figures are, also where a note that the terminal does not show says it."""
    return view.invalid(replace(report, notes=()))


def _figures(rows: Sequence[view.Row]) -> str:
    unwanted = {"floor"} if any(row.gate for row in rows) else {"floor", "gate"}  # the report has room for all
    kept = [place for place, name in enumerate(view.COLUMNS) if name not in unwanted]
    columns = [view.COLUMNS[place] for place in kept]
    return table(columns, [[row.cells[place] for place in kept] for row in rows])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain columns: the first and the gate to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
    left = {0, *(i for i, name in enumerate(columns) if name == "gate")}

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(padded).rstrip()

    return "\n".join(line(cells) for cells in (columns, *rows))
