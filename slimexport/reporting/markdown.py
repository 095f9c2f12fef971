"""report.md: what a colleague understands in one minute."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from slimexport.reporting import view
from slimexport.reporting.schema import Report


def render(report: Report) -> str:
    first, rest = view.tables(report)
    parts = [
        f"# {text(report.headline)}",
        *(f"- {text(result.message)}" for result in view.reasons(report)),
        text(view.sentence(report)),
        table(view.COLUMNS, [row.cells for row in first], right=view.NUMBERS),
        view.LEGEND,
    ]
    parts += [f"- {text(note)}" for note in view.notes(report)]
    if several := view.exports(report):
        parts += ["## Every export", table(view.EXPORT_COLUMNS, several, right=range(1, 6)), view.EXPORT_LEGEND]
    if rest:
        parts.append(_folded("All other figures", table(view.COLUMNS, [r.cells for r in rest], right=view.NUMBERS)))
    parts += [
        "## What was removed",
        table(view.REMOVED_COLUMNS, view.removed(report.plan), right=(1, 2, 3)),
        f"Ratio asked {report.plan.ratio_asked:.4f}, reached {report.plan.ratio:.4f}.",
    ]
    parts += [f"- {text(note)}" for note in report.plan.notes]
    parts.append(
        _folded(
            f"What {len(report.plan.blocks)} blocks kept, and their relative output errors",
            table(view.BLOCK_COLUMNS, view.blocks(report), right=range(6)),
        )
    )
    if report.recovery:
        parts += [
            "## How it was trained",
            text(view.recovery_sentence(report.recovery)),
            table(view.RECOVERY_COLUMNS, view.recovery(report.recovery), right=range(1, 5)),
        ]
        parts += [f"- {text(note)}" for note in report.recovery.notes]
    if made := report.verification.continuations:
        rows = [(c.prompt, c.dense or view.DASH, c.shrunk, view.same_tokens(c)) for c in made]
        beside = table(("text", "dense goes on", "shrunk goes on", ""), rows)
        parts.append(_folded("How both go on", f"{view.CONTINUATIONS}\n\n{beside}"))
    texts = view.texts(report)
    if texts:
        parts += ["## Texts", table(("use", "name", "tokens", "sha256", "licence, notes"), texts, right=(2,))]
    parts += ["## Do it again", f"```sh\n{view.command(report)}\n```"]
    parts += [f"Typed: {text(report.command)}"] if report.command else []
    parts += [text(line) for line in (view.versions(report), view.timings(report)) if line]
    parts.append(f"Model fingerprint {text(report.source.fingerprint)}; seed {report.config.get('seed', view.DASH)}.")
    return "\n\n".join(parts).replace("\n\n- ", "\n- ") + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    numbers = set(right)
    rule = ["---:" if i in numbers else "---" for i in range(len(columns))]
    lines = [columns, rule, *([text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{text(title)}</summary>\n\n{body}\n\n</details>"


def text(value: str) -> str:
    """Names come from files and hubs: neither markup nor a table's bars may come along."""
    escaped = re.sub(r"&(?=#?\w+;)", "&amp;", " ".join(value.split()))
    escaped = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", escaped)  # a tag may follow; `<= 1.5` stays as it reads best
    for character in "\\|*`[]":
        escaped = escaped.replace(character, "\\" + character)
    return escaped
