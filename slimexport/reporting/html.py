"""report.html: everything about one run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from slimexport.artifacts import Continuation, PruningPlan
from slimexport.reporting import page, plots, view
from slimexport.reporting.schema import Report


def render(report: Report) -> str:
    first, rest = view.tables(report)
    state = "passed" if report.passed else "failed"
    body = [
        f'<header class="verdict {state}"><h1>{escape(report.headline)}</h1>'
        f"{page.bullets(r.message for r in view.reasons(report))}<p>{escape(view.sentence(report))}</p></header>",
        page.section("Figures", _figures(first), page.soft(view.LEGEND), page.bullets(view.notes(report)), _more(rest)),
        *([page.section("Pictures", page.pictures(drawn))] if (drawn := plots.all_of(report)) else []),
        *(
            [
                page.section(
                    "Every export",
                    page.scroll(page.table(view.EXPORT_COLUMNS, several, "figures", right=range(1, 6))),
                    page.soft(view.EXPORT_LEGEND),
                )
            ]
            if (several := view.exports(report))
            else []
        ),
        page.section(
            "What was removed",
            page.table(view.REMOVED_COLUMNS, view.removed(report.plan), "figures", right=(1, 2, 3)),
            page.soft(f"Ratio asked {report.plan.ratio_asked:.4f}, reached {report.plan.ratio:.4f}."),
            page.bullets(report.plan.notes),
        ),
        page.section(
            "What every block kept",
            _bars(report.plan, "heads"),
            _bars(report.plan, "channels"),
            page.folded("Numbers", page.scroll(page.table(view.BLOCK_COLUMNS, view.blocks(report), right=range(6)))),
        ),
    ]
    if report.recovery:
        rows = view.recovery(report.recovery)
        body.append(
            page.section(
                "How it was trained",
                page.soft(view.recovery_sentence(report.recovery)),
                page.scroll(page.table(view.RECOVERY_COLUMNS, rows, "figures", right=range(1, 5))),
                page.bullets(report.recovery.notes),
            )
        )
    if made := report.verification.continuations:
        body.append(page.section("How both go on", page.soft(view.CONTINUATIONS), *map(_continuation, made)))
    if texts := view.texts(report):
        columns = ("use", "name", "tokens", "sha256", "licence, notes")
        body.append(page.section("Texts", page.table(columns, texts, "figures texts", right=(2,))))
    lines = [view.versions(report), view.timings(report), f"Model fingerprint {report.source.fingerprint}."]
    if report.command:
        lines.insert(0, f"Typed: {report.command}")
    body.append(
        page.section(
            "Do it again", f"<pre>{escape(view.command(report))}</pre>", *(page.soft(line) for line in lines if line)
        )
    )
    return page.page(f"{report.source.name}: {state}", body)


def _continuation(made: Continuation) -> str:
    texts = [("dense", made.dense), ("shrunk", made.shrunk)]
    beside = "".join(
        f"<div>{page.soft(name)}<blockquote>{escape(text)}</blockquote></div>"
        for name, text in texts
        if text is not None
    )
    return f'<p>… {escape(made.prompt)} …</p><div class="beside">{beside}</div>{page.soft(view.same_tokens(made))}'


def _bars(plan: PruningPlan, what: str) -> str:
    """One bar a block, full height = dense, filled = kept."""
    pairs = [
        (k.query_heads, d.query_heads) if what == "heads" else (k.channels, d.channels)
        for k, d in zip(plan.blocks, plan.dense, strict=True)
    ]
    kept, dense = sum(k for k, _ in pairs), sum(d for _, d in pairs)
    name = "query heads" if what == "heads" else "channels"
    caption = f"{name}: {kept:,} of {dense:,} kept; one bar a block, the first block on the left"
    bars = []
    for i, (k, d) in enumerate(pairs):
        height = 100 * k / d if d else 0
        place = f'x="{i * 10}" width="8"'
        bars.append(
            f'<g><title>block {i}: {k} of {d} {name}</title><rect class="gone" {place} y="0" height="100"/>'
            f'<rect class="{what}" {place} y="{100 - height:.1f}" height="{height:.1f}"/></g>'
        )
    return (
        f'{page.soft(caption)}<svg role="img" aria-label="{escape(caption)}" viewBox="0 0 {10 * len(pairs) - 2} 100" '
        f'preserveAspectRatio="none" class="blocks">{"".join(bars)}</svg>'
    )


def _figures(rows: Sequence[view.Row]) -> str:
    return page.table(view.COLUMNS, [row.cells for row in rows], "figures", view.NUMBERS, [row.state for row in rows])


def _more(rows: Sequence[view.Row]) -> str:
    return page.folded("All other figures", _figures(rows)) if rows else ""
