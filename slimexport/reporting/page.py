"""A page that opens anywhere: one file, no scripts, no network, readable on a phone, in the dark and printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from slimexport.reporting import view

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
section { overflow-x: clip; }
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


def page(title: str, parts: Iterable[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing in the file may run or be fetched, whatever a model's name contains.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def table(
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


def pictures(drawn: Sequence[tuple[str, str]]) -> str:
    """Captions (title: what the picture shows, in words) and SVGs."""
    each = []
    for caption, svg in drawn:
        title, _, numbers = caption.partition(": ")
        each.append(f"<figure><figcaption>{escape(title)}</figcaption>{svg}{soft(numbers)}</figure>")
    return f'<div class="plots">{"".join(each)}</div>'


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def scroll(table: str) -> str:
    return f'<div class="wide">{table}</div>'


def folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def soft(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def bullets(items: Iterable[str]) -> str:
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{lines}</ul>" if lines else ""
