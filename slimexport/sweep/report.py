"""What a sweep found: sweep.json (every number), sweep.md and sweep.html (table, fronts, recommendation)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from slimexport.artifacts import SCHEMA_VERSION, write_json, write_text
from slimexport.gates.figures import TTFT
from slimexport.reporting import markdown, page, plots, view
from slimexport.sweep.front import COSTS, Recommendation, front, quality_of
from slimexport.sweep.points import FIGURES, REPORTS, Point, Sweep

JSON_NAME, MARKDOWN_NAME, HTML_NAME = REPORTS
_HEADS = ("MB", "perplexity", "KL", "TTFT {} (ms)", "TPOT (ms)", "RSS (MB)")
LEGEND = (
    "In brackets the ratio to the dense model, interleaved with it in one run; times of different rows were measured "
    "one after the other. A star marks a point that no other one beats in size and quality, a plus one that none beats "
    "in time and quality."
)


def columns(points: Sequence[Point]) -> list[tuple[str, str]]:
    """Names of figures that at least one point has, and their heads."""
    had = dict.fromkeys(name for point in points for name in point.values)
    made = []
    for name, head in zip(FIGURES, _HEADS, strict=True):
        if name.startswith(TTFT) and name not in had:  # the prompt length that there is instead
            name = next((other for other in had if other.startswith(TTFT)), name)
        if name in had:
            made.append((name, head.format(name.rpartition(".")[2])))
    return made


def rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    fronts = [front(points, cost) for cost in COSTS]
    made = []
    for point in points:
        marks = "".join(mark for mark, of in zip("*+", fronts, strict=True) if point in of)
        if point.failed:
            made.append((f"{point.ratio:g}", point.export, f"failed: {point.failed}", *[""] * len(columns(points))))
            continue
        cells = [_cell(point, name) for name, _ in columns(points)]
        made.append((f"{point.ratio:g}", point.export, marks, *cells))
    return made


def heads(points: Sequence[Point]) -> tuple[str, ...]:
    return ("ratio", "export", "front", *(head for _, head in columns(points)))


def _cell(point: Point, name: str) -> str:
    if name not in point.values:
        return view.DASH
    ratio = point.ratios.get(name)
    return view.number(point.values[name]) + (f" ({ratio:.3f})" if ratio is not None else "")


def command(sweep: Sweep, point: Point) -> str:
    """What makes the model of `point`, and nothing else."""
    config = sweep.configs[point.ratio].model_copy(update={"target": (point.target,), "precision": (point.precision,)})
    return view.command_of(json.loads(config.model_dump_json()))


def fronts(points: Sequence[Point]) -> list[plots.Plot]:
    made = (_front(points, "size.export_mb", "MB"), _front(points, "decode.tpot_ms", "TPOT (ms)"))
    return [plot for plot in made if plot is not None]


def _front(points: Sequence[Point], cost: str, unit: str) -> plots.Plot | None:
    quality = quality_of(points)
    best = front(points, cost)
    if quality is None or not best:
        return None
    caption = f"{cost} and {quality}, the front as a line: " + "; ".join(
        f"{point.name} {point.values[cost]:.4g}, {point.values[quality]:.4g}" for point in best
    )
    with plots.drawing(caption, height=3.2) as (axes, done):
        axes.plot([p.values[cost] for p in best], [p.values[quality] for p in best], color=plots.SHRUNK, linewidth=1)
        kinds = list(dict.fromkeys(point.export for point in points))
        for number, kind in enumerate(kinds):
            of = [p for p in points if p.export == kind and cost in p.values and quality in p.values]
            colour = (plots.SHRUNK, plots.OTHER, plots.DENSE)[number % 3]
            places = [p.values[cost] for p in of], [p.values[quality] for p in of]
            axes.plot(*places, "osv^DPX"[number % 7], color=colour, label=kind)
            for point in of:
                place = point.values[cost], point.values[quality]
                axes.annotate(f"{point.ratio:g}", place, textcoords="offset points", xytext=(5, 3), fontsize=8)
        axes.set(xlabel=unit, ylabel=quality)
        axes.margins(0.12)
        axes.legend(fontsize=8)
    return caption, done[0]


def to_json(sweep: Sweep, advice: Recommendation | None) -> dict[str, Any]:
    best: Mapping[str, list[str]] = {cost: [point.name for point in front(sweep.points, cost)] for cost in COSTS}
    return {
        "schema_version": SCHEMA_VERSION,
        "model": sweep.source,
        "points": [{"name": point.name, **asdict(point)} for point in sweep.points],
        "fronts": best,
        "exit_codes": {f"{ratio:g}": code for ratio, code in sweep.codes.items()},
        "recommendation": None
        if advice is None
        else {
            "why": advice.why,
            "point": advice.point.name if advice.point else None,
            "command": command(sweep, advice.point) if advice.point else None,
        },
    }


def to_markdown(sweep: Sweep, advice: Recommendation | None) -> str:
    parts = [f"# Sweep of {markdown.text(sweep.source)}", *_advice(sweep, advice)]
    parts += [markdown.table(heads(sweep.points), rows(sweep.points), right=range(3, 3 + len(_HEADS))), LEGEND]
    return "\n\n".join(parts) + "\n"


def _advice(sweep: Sweep, advice: Recommendation | None) -> list[str]:
    if advice is None:
        return []
    made = [markdown.text(advice.why)]
    return [*made, f"```sh\n{command(sweep, advice.point)}\n```"] if advice.point else made


def to_html(sweep: Sweep, advice: Recommendation | None) -> str:
    body = []
    if advice is not None:
        state = "passed" if advice.point else "failed"
        how = f"<pre>{escape(command(sweep, advice.point))}</pre>" if advice.point else ""
        body.append(f'<header class="verdict {state}"><h1>{escape(advice.why)}</h1>{how}</header>')
    right = range(3, 3 + len(_HEADS))
    table = page.table(heads(sweep.points), rows(sweep.points), "figures", right=right)
    body.append(page.section(f"Sweep of {sweep.source}", page.scroll(table), page.soft(LEGEND)))
    if drawn := fronts(sweep.points):
        body.append(page.section("Fronts", page.pictures(drawn)))
    commands = "\n".join(command(sweep, point) for point in sweep.points if not point.failed)
    body.append(page.section("Do it again", f"<pre>{escape(commands)}</pre>"))
    return page.page(f"Sweep of {sweep.source}", body)


def write(sweep: Sweep, advice: Recommendation | None, directory: Path) -> None:
    write_json(directory / JSON_NAME, to_json(sweep, advice))
    write_text(directory / MARKDOWN_NAME, to_markdown(sweep, advice))
    write_text(directory / HTML_NAME, to_html(sweep, advice))


def summary(sweep: Sweep, advice: Recommendation | None, directory: Path) -> str:
    from slimexport.reporting import terminal

    lines = [terminal.table(heads(sweep.points), rows(sweep.points)), LEGEND]
    if advice is not None:
        lines += ["", advice.why, *([command(sweep, advice.point)] if advice.point else [])]
    return "\n".join([*lines, "", f"report: {directory / MARKDOWN_NAME} (also .html, {JSON_NAME})"])
