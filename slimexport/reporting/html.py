"""report.html: one file that opens anywhere: no scripts, no network, readable on a phone and in the dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from slimexport.artifacts import Continuation, PruningPlan
from slimexport.reporting import plots, view
from slimexport.reporting.schema import Report

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #dde2e9; --page: #f5f7fa; --card: #ffffff;
  --kept: #2f6fde; --kept-2: #12908e; --gone: #e3e8ef; --good: #12703f; --good-page: #e2f5ea; --bad: #a3201d;
  --bad-page: #fde8e6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ebf1; --soft: #9aa6b6; --line: #303947; --page: #12161c;
  --card: #1a2029; --kept: #6ea0ff; --kept-2: #45c4bf; --gone: #2b3441; --good: #7be0a8; --good-page: #123322;
  --bad: #ffaaa3; --bad-page: #401b1a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.25rem; margin: 0; } h2 { font-size: 1.05rem; margin: 0 0 .75rem; }
.verdict { border-left: .4rem solid; border-radius: .5rem; padding: 1rem 1.2rem; overflow-wrap: anywhere; }
.verdict.passed { color: var(--good); background: var(--good-page); }
.verdict.failed { color: var(--bad); background: var(--bad-page); }
.verdict p { color: var(--ink); margin: .4rem 0 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem 1.2rem;
  margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: .85rem; }
th, td { padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td, th { overflow-wrap: break-word; } td.n, th.n { text-align: right; white-space: nowrap; }
.texts td + td { overflow-wrap: anywhere; }
tr.passed td:last-child { color: var(--good); } tr.failed td:last-child { color: var(--bad); font-weight: 600; }
tr.undecided td:last-child { font-weight: 600; font-style: italic; }
.wide { overflow-x: auto; }
.wide td { overflow-wrap: normal; white-space: nowrap; }
p, ul { margin: .6rem 0 0; } ul { padding-left: 1.2rem; } .soft { color: var(--soft); font-size: .87rem; }
summary { cursor: pointer; margin-top: .8rem; color: var(--soft); } details > * + * { margin-top: .6rem; }
pre { background: var(--page); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
svg.blocks { display: block; width: 100%; height: 5.5rem; margin: .2rem 0 .9rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; break-inside: avoid; } figure svg { display: block; width: 100%; height: auto; font: inherit; }
figcaption { font-weight: 500; margin-bottom: .3rem; } figure p { margin-top: .2rem; }
blockquote { margin: .6rem 0 0; padding-left: .8rem; border-left: .2rem solid var(--line); overflow-wrap: anywhere; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 0 1.2rem; }
:focus-visible { outline: .15rem solid var(--kept); outline-offset: .1rem; }
@media print { :root { --page: #ffffff; } section { break-inside: avoid; border: 0; padding: 0; } main { padding: 0; } }
.gone { fill: var(--gone); } .heads { fill: var(--kept); } .channels { fill: var(--kept-2); }
@media (max-width: 38rem) {
  .figures thead { display: none; } .figures, .figures tbody, .figures tr, .figures td { display: block; }
  .figures tr { padding: .5rem 0; border-bottom: 1px solid var(--line); } .figures tr:last-child { border: 0; }
  .figures td { display: flex; white-space: normal; min-width: 0; overflow-wrap: anywhere;
    justify-content: space-between; gap: 1rem; padding: .1rem 0; border: 0;
    text-align: right; }
  .figures td::before { content: attr(data-label); color: var(--soft); text-align: left; flex: none; }
  .figures td:first-child { font-weight: 600; text-align: left; } .figures td:first-child::before { content: none; }
  .figures td.none { display: none; }
}
"""


def render(report: Report) -> str:
    first, rest = view.tables(report)
    state = "passed" if report.passed else "failed"
    body = [
        f'<header class="verdict {state}"><h1>{escape(report.headline)}</h1>'
        f"{_list(r.message for r in view.reasons(report))}<p>{escape(view.sentence(report))}</p></header>",
        _section("Figures", _figures(first), _soft(view.LEGEND), _list(view.notes(report)), _more(rest)),
        *([_section("Pictures", _plots(drawn))] if (drawn := plots.all_of(report)) else []),
        *(
            [
                _section(
                    "Every export",
                    _scroll(_table(view.EXPORT_COLUMNS, several, "figures", right=range(1, 6))),
                    _soft(view.EXPORT_LEGEND),
                )
            ]
            if (several := view.exports(report))
            else []
        ),
        _section(
            "What was removed",
            _table(view.REMOVED_COLUMNS, view.removed(report.plan), "figures", right=(1, 2, 3)),
            _soft(f"Ratio asked {report.plan.ratio_asked:.4f}, reached {report.plan.ratio:.4f}."),
            _list(report.plan.notes),
        ),
        _section(
            "What every block kept",
            _bars(report.plan, "heads"),
            _bars(report.plan, "channels"),
            _folded("Numbers", _scroll(_table(view.BLOCK_COLUMNS, view.blocks(report), right=range(6)))),
        ),
    ]
    if made := report.verification.continuations:
        body.append(_section("How both go on", _soft(view.CONTINUATIONS), *map(_continuation, made)))
    if texts := view.texts(report):
        columns = ("use", "name", "tokens", "sha256", "licence, notes")
        body.append(_section("Texts", _table(columns, texts, "figures texts", right=(2,))))
    lines = [view.versions(report), view.timings(report), f"Model fingerprint {report.source.fingerprint}."]
    if report.command:
        lines.insert(0, f"Typed: {report.command}")
    body.append(
        _section("Do it again", f"<pre>{escape(view.command(report))}</pre>", *(_soft(line) for line in lines if line))
    )
    title = f"{report.source.name}: {state}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing in the file may run or be fetched, whatever a model's name contains.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _plots(drawn: Sequence[plots.Plot]) -> str:
    each = []
    for caption, svg in drawn:
        title, _, numbers = caption.partition(": ")
        each.append(f"<figure><figcaption>{escape(title)}</figcaption>{svg}{_soft(numbers)}</figure>")
    return f'<div class="plots">{"".join(each)}</div>'


def _continuation(made: Continuation) -> str:
    texts = [("dense", made.dense), ("shrunk", made.shrunk)]
    beside = "".join(
        f"<div>{_soft(name)}<blockquote>{escape(text)}</blockquote></div>" for name, text in texts if text is not None
    )
    return f'<p>… {escape(made.prompt)} …</p><div class="beside">{beside}</div>{_soft(view.same_tokens(made))}'


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
        f'{_soft(caption)}<svg role="img" aria-label="{escape(caption)}" viewBox="0 0 {10 * len(pairs) - 2} 100" '
        f'preserveAspectRatio="none" class="blocks">{"".join(bars)}</svg>'
    )


def _figures(rows: Sequence[view.Row]) -> str:
    return _table(view.COLUMNS, [row.cells for row in rows], "figures", view.NUMBERS, [row.state for row in rows])


def _more(rows: Sequence[view.Row]) -> str:
    return _folded("All other figures", _figures(rows)) if rows else ""


def _table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    css: str = "",
    right: Iterable[int] = (),
    states: Sequence[str] = (),
) -> str:
    numbers = set(right)

    def css_class(i: int, text: str = "x") -> str:
        names = ["n"] * (i in numbers) + ["none"] * (text in ("", view.DASH))
        return f' class="{" ".join(names)}"' if names else ""

    head = "".join(f"<th{css_class(i)}>{escape(name)}</th>" for i, name in enumerate(columns))
    lines = []
    for j, row in enumerate(rows):
        cells = (
            f'<td{css_class(i, cell)} data-label="{escape(columns[i])}">{escape(cell)}</td>'
            for i, cell in enumerate(row)
        )
        state = f' class="{states[j]}"' if j < len(states) and states[j] else ""
        lines.append(f"<tr{state}>{''.join(cells)}</tr>")
    return f'<table class="{css}"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _scroll(table: str) -> str:
    return f'<div class="wide">{table}</div>'


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _soft(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def _list(items: Iterable[str]) -> str:
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{lines}</ul>" if lines else ""
