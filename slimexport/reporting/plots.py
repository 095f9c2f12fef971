"""The pictures of report.html, as inline SVG that takes its colours from the page: light, dark and printed alike.

Drawn by matplotlib, without pyplot and its windows. Every function gives None where there is nothing to draw.
"""

from __future__ import annotations

import atexit
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from slimexport.artifacts import Figure, VerificationReport, is_quantised
from slimexport.reporting.schema import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-ins that no plot would choose, and what of the page's style takes their place.
_INK, _SOFT, _LINE, DENSE, SHRUNK, OTHER = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
_COLOURS = {
    _INK: "var(--ink)",
    _SOFT: "var(--soft)",
    _LINE: "var(--line)",
    DENSE: "var(--soft)",
    SHRUNK: "var(--kept)",
    OTHER: "var(--kept-2)",
}
_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable, read aloud
    "font.size": 10,
    "text.parse_math": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
}
_WIDTH, _HEIGHT = 4.7, 2.6  # inches
_CONTROL = re.compile(r"[\x00-\x1f]")  # no font has them
_TAIL = 99.5  # percentile of ITL where its picture ends

Plot = tuple[str, str]
"""The caption, which says it all without the picture, and the SVG."""


def all_of(report: Report) -> list[Plot]:
    made = (
        speedups(report.verification),
        prompt_lengths(report.verification),
        token_times(report.verification),
        errors(report),
        size_against_quality(report),
        recovery(report),
    )
    return [plot for plot in made if plot is not None]


def speedups(report: VerificationReport) -> Plot | None:
    """How much faster, with its interval, beside the ideal."""
    times = [f for f in report.figures if f.name.startswith(("prefill.", "decode.")) and f.better == "lower"]
    figures = [f for f in times if f.valid and f.ratio and f.ideal]
    if not figures:
        return None
    caption = "Speed-up beside its ideal: " + "; ".join(
        f"{f.name} {1 / (f.ratio or 1):.2f} of {1 / (f.ideal or 1):.2f}" for f in figures
    )
    with drawing(caption, height=1.2 + 0.28 * len(figures)) as (axes, done):
        rows = np.arange(len(figures))[::-1]
        for row, figure in zip(rows, figures, strict=True):
            ratio = figure.ratio or 1.0
            low, high = 1 / (figure.ratio_high or ratio), 1 / (figure.ratio_low or ratio)
            axes.plot([low, high], [row, row], color=SHRUNK, linewidth=2.5, solid_capstyle="butt")
        axes.plot([1 / (f.ratio or 1) for f in figures], rows, "o", color=SHRUNK, label="measured", markersize=5)
        axes.plot([1 / (f.ideal or 1) for f in figures], rows, "|", color=_INK, label="ideal", markersize=12)
        axes.axvline(1, color=_SOFT, linewidth=0.8)
        axes.set_yticks(rows, [_CONTROL.sub(" ", f.name) for f in figures])
        axes.set_xlabel("times as fast as dense")
        axes.margins(y=0.5 / len(figures))
        axes.figure.legend(loc="outside upper center", ncols=2)
    return caption, done[0]


def prompt_lengths(report: VerificationReport) -> Plot | None:
    """TTFT over prompt length."""
    times = report.latency.get("ttft_ms", {})
    lengths = sorted(int(n) for n in times.get("shrunk", {}))
    if len(lengths) < 2 or not _counts(report, "prefill.ttft_ms"):
        return None
    medians = {model: [float(np.median(of[str(n)])) for n in lengths] for model, of in times.items()}
    caption = "Time to the first token by prompt length: " + "; ".join(
        f"{n} tokens {' → '.join(f'{medians[m][i]:.4g}' for m in ('baseline', 'shrunk') if m in medians)} ms"
        for i, n in enumerate(lengths)
    )
    with drawing(caption) as (axes, done):
        for model, values in medians.items():
            axes.plot(lengths, values, "o-", color=_colour(model), label=_name(model), markersize=4)
        axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="TTFT (ms)")
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.minorticks_off()
        ticks = _ticks([value for values in medians.values() for value in values])
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.legend()
    return caption, done[0]


def token_times(report: VerificationReport) -> Plot | None:
    """The distribution of ITL."""
    times = {model: np.sort(np.concatenate(runs)) for model, runs in report.latency.get("itl_ms", {}).items() if runs}
    if "shrunk" not in times or not _counts(report, "decode.tpot_ms"):
        return None
    caption = "Time between output tokens: " + "; ".join(
        f"{_name(model)} median {np.median(of):.4g} ms, 99 % within {np.percentile(of, 99):.4g} ms"
        for model, of in times.items()
    )
    with drawing(caption) as (axes, done):
        for model, of in times.items():
            axes.plot(of, np.arange(1, len(of) + 1) / len(of), color=_colour(model), label=_name(model))
        ends = [(float(of[0]), float(np.percentile(of, _TAIL))) for of in times.values()]
        low, high = min(end[0] for end in ends), max(end[1] for end in ends)
        axes.set(xlabel="ITL (ms)", ylabel="share of tokens within", ylim=(0, 1.02))
        axes.set_xlim(low - 0.03 * (high - low) - 1e-9, high + 0.03 * (high - low) + 1e-9)
        axes.legend(loc="lower right")
    return caption, done[0]


def errors(report: Report) -> Plot | None:
    """Relative squared error of every block's outputs, before and after compensation."""
    blocks = report.pruning.blocks if report.pruning else ()
    kinds = {
        "attention": [(b.block, b.attention_error_before, b.attention_error) for b in blocks],
        "FFN": [(b.block, b.ffn_error_before, b.ffn_error) for b in blocks],
    }
    shown = {kind: rows for kind, of in kinds.items() if (rows := [row for row in of if row[1] > 0 and row[2] > 0])}
    if not shown:
        return None
    caption = "Relative error of each block's output, without and with compensation: " + "; ".join(
        f"{kind} {np.median([row[1] for row in rows]):.3g} → {np.median([row[2] for row in rows]):.3g} in the median"
        for kind, rows in shown.items()
    )
    with drawing(caption) as (axes, done):
        for kind, rows in shown.items():
            colour = SHRUNK if kind == "FFN" else OTHER
            numbers, before, after = zip(*rows, strict=True)
            axes.vlines(numbers, after, before, color=colour, linewidth=1, alpha=0.5)
            style: dict[str, Any] = {"color": colour, "markersize": 3.5}
            axes.plot(numbers, before, "o", markerfacecolor="none", label=f"{kind}, without", **style)
            axes.plot(numbers, after, "o", label=f"{kind}, with", **style)
        axes.set(yscale="log", xlabel="block", ylabel="||ΔW X||² / ||W X||²")
        axes.set_xlim(-0.5, len(blocks) - 0.5)
        axes.locator_params(axis="x", integer=True)
        axes.minorticks_off()  # which matplotlib would label in TeX where there is less than a decade
        ticks = _ticks([value for rows in shown.values() for row in rows for value in row[1:]])
        axes.set_yticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return caption, done[0]


def size_against_quality(report: Report) -> Plot | None:
    """Every export of this run, and the dense one in full precision, which perplexity is held to."""
    each = report.each
    points = []
    for name, made in each.items():
        size, quality = made.figure("size.export_mb"), made.figure("accuracy.perplexity")
        if size and quality and size.shrunk and quality.ratio:
            points.append((name, size.shrunk, quality.ratio))
    # An export has beside it the dense one of its own precision.
    rounded = {name for name, artifact in report.exports.items() if is_quantised(artifact.precision)}
    full = [name for name in each if name not in rounded]
    found = [(f"dense ({name})", f.baseline, 1.0) for name in full[:1]
             if (f := each[name].figure("size.export_mb")) and f.baseline]  # fmt: skip
    if not points:
        return None
    caption = "Size and token perplexity over dense: " + "; ".join(
        f"{name} {size:.4g} MB, {ratio:.3f}" for name, size, ratio in (*found, *points)
    )
    with drawing(caption) as (axes, done):
        for name, megabytes, ratio in found:
            axes.plot([megabytes], [ratio], "s", color=DENSE, label=name, markersize=5)
        for number, (name, megabytes, ratio) in enumerate(points):
            marker = "o^vDP*X"[number % 7]
            axes.plot([megabytes], [ratio], marker, color=SHRUNK, label=name, markersize=6)
        axes.set(xlabel="MB", ylabel="perplexity / dense")
        axes.set_xlim(0, 1.08 * max(size for _, size, _ in (*found, *points)))
        axes.margins(y=0.15)
        axes.legend(fontsize=8)
    return caption, done[0]


def recovery(report: Report) -> Plot | None:
    """How far held-out text was from the dense model's output while the shrunk one was trained, by domain."""
    made = report.recovery
    if made is None or len(made.points) < 2:
        return None
    tokens = [point.tokens for point in made.points]
    domains = list(made.points[0].held_out)
    caption = f"KL divergence to dense on held-out text over {tokens[-1]:,} tokens of training: " + "; ".join(
        f"{name} {made.points[0].held_out[name].divergence:.3f} → {made.kept.held_out[name].divergence:.3f}"
        for name in domains
    )
    with drawing(caption) as (axes, done):
        for number, name in enumerate(domains):
            values = [point.held_out[name].divergence for point in made.points]
            colour, line = (SHRUNK, OTHER, DENSE)[number % 3], ("-", "--", ":")[number // 3 % 3]
            axes.plot(tokens, values, f"o{line}", color=colour, label=_CONTROL.sub(" ", name), markersize=3)
        axes.axvline(made.kept.tokens, color=_SOFT, linewidth=0.8)
        axes.set(xlabel="tokens", ylabel="KL (nats/token)", ylim=(0, None))
        axes.legend(fontsize=8)
    return caption, done[0]


# -------------------------------------------------------------------------------------------------------------- pieces


def _counts(report: VerificationReport, prefix: str) -> bool:
    """Whether what was measured under these names is worth a picture."""
    found: list[Figure] = [figure for figure in report.figures if figure.name.startswith(prefix)]
    return bool(found) and all(figure.valid for figure in found)


def _name(model: str) -> str:
    return "dense" if model == "baseline" else model


def _colour(model: str) -> str:
    return DENSE if model == "baseline" else SHRUNK


_MOST_TICKS = 8


def _ticks(values: Sequence[float]) -> list[float]:
    """1, 2, 5 and their tens that lie among the values of a logarithmic axis; at least the ends."""
    low, high = min(values), max(values)
    tens = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    inside = [step * 10.0**ten for ten in tens for step in (1, 2, 5) if low <= step * 10.0**ten <= high]
    if len(inside) > _MOST_TICKS:
        inside = [10.0**ten for ten in tens if low <= 10.0**ten <= high]
    return inside if len(inside) > 1 else [low, high]


@contextmanager
def drawing(caption: str, height: float = _HEIGHT) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on, and a list that holds the SVG afterwards."""
    _keep_out_of_home()
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    done: list[str] = []
    with mpl.rc_context({**_STYLE, "svg.hashsalt": caption}):
        canvas = Canvas(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(canvas)
        yield canvas.add_subplot(), done
        written = io.StringIO()
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(written, format="svg", transparent=True, metadata=empty)
    done.append(_inline(written.getvalue(), caption))


def _keep_out_of_home() -> None:
    """matplotlib would leave its list of fonts in the user's cache; nothing is written outside the output directory."""
    if "matplotlib" not in sys.modules and "MPLCONFIGDIR" not in os.environ:
        place = tempfile.mkdtemp(prefix="slimexport-")
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        os.environ["MPLCONFIGDIR"] = place


def _inline(svg: str, caption: str) -> str:
    """The <svg> element alone, without what is for files, would style the rest of the page, or name a font."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r'\sxmlns(?::\w+)?="[^"]*"', "", body)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", body)
    body = re.sub(r" font-family: [^;\"]*;", "", body)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = body.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    for stand_in, colour in _COLOURS.items():
        body = body.replace(stand_in, colour)
    return re.sub(r"\s*\n\s*", " ", body).strip()
