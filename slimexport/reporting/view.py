"""What every rendering shows, as text: rows of figures, what was removed, how to do it again. No markup in here."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from slimexport.artifacts import (
    BlockSizes,
    ChatCheck,
    Continuation,
    Estimates,
    Figure,
    PruningPlan,
    Recovery,
    VerificationReport,
)
from slimexport.config import RunConfig
from slimexport.gates.decide import GateResult
from slimexport.gates.declared import Gate
from slimexport.gates.figures import TTFT
from slimexport.progress import seconds
from slimexport.reporting.schema import Report

DASH = "–"
_HEADLINES = 14  # more than that is not read in one minute; the others follow below, folded
_DETAILS = (".p90", ".p99", ".min", ".max", ".mean", ".std", "_low", "_high")


@dataclass(frozen=True)
class Row:
    """A figure as the tables print it. `state` is passed, failed, undecided or "" (no gate on it)."""

    name: str
    dense: str
    shrunk: str
    ratio: str
    ideal: str
    floor: str
    gate: str
    state: str

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.name, self.dense, self.shrunk, self.ratio, self.ideal, self.floor, self.gate)


LEGEND = (
    "Ratio is shrunk / dense, with its confidence interval where one was measured; ideal is the ratio that the "
    "removed bytes or FLOPs would give, and in brackets the speed-up (dense / shrunk) as a share of the one that this "
    "would be; floor is how many times "
    "longer it took than reading the weights once (decoding) or multiplying (prefill) would take on this machine."
)
EXPORT_LEGEND = (
    "In brackets the ratio to the dense model: in the same precision where time and size are concerned, in full "
    "precision where accuracy is."
)
CONTINUATIONS = (
    "Greedy tokens after stretches of the evaluation text. Other words are not worse ones; nonsense is seen at once."
)
COLUMNS = ("figure", "dense", "shrunk", "ratio", "ideal", "floor", "gate")
NUMBERS = (1, 2, 3, 4, 5)  # those of COLUMNS
REMOVED_COLUMNS = ("", "dense", "shrunk", "ratio")
EXPORT_COLUMNS = ("export", "MB", "token perplexity", "KL", "TTFT (ms)", "TPOT (ms)")
_WORST_FIRST = ("failed", "undecided", "passed")
BLOCK_COLUMNS = ("block", "query heads", "KV groups", "channels", "attention error", "FFN error")


def number(value: float | None) -> str:
    """Four significant digits, thousands apart; a dash for None."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    # Small ones in powers of ten; the rest without, and without zeros that were not measured.
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.4g}"


def percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def figure_row(figure: Figure, results: tuple[GateResult, ...] = ()) -> Row:
    on_it = [r for r in results if r.gate.figure == figure.name]
    name = _with_unit(figure)
    gate = "; ".join(_gate(r) for r in on_it)
    state = "" if not on_it else min((r.outcome for r in on_it), key=_WORST_FIRST.index)
    if not figure.valid:  # why stands below the table, once for all of one reason
        return Row(name, DASH, "invalid", DASH, _ratio(figure.ideal), DASH, gate, state)
    ratio = _ratio(figure.ratio)
    if figure.ratio is not None and figure.ratio_low is not None and figure.ratio_high is not None:
        ratio += f" ({figure.ratio_low:.3f} to {figure.ratio_high:.3f})"
    floor = f"{figure.shrunk / figure.floor:.2f} x" if figure.shrunk and figure.floor else DASH
    return Row(name, number(figure.baseline), number(figure.shrunk), ratio, _ideal(figure), floor, gate, state)


def _ideal(figure: Figure) -> str:
    """The ideal ratio, and the measured speed-up as a share of the one that it stands for."""
    if figure.ideal is None or figure.ratio is None or figure.ratio <= 0:
        return _ratio(figure.ideal)
    share = figure.ideal / figure.ratio if figure.better == "lower" else figure.ratio / figure.ideal
    return f"{_ratio(figure.ideal)} ({share:.0%})"


def reasons(report: Report) -> tuple[GateResult, ...]:
    """The gates that say something beside the verdict: those that did not pass."""
    return tuple(result for result in report.gates if not result.passed)


def tables(report: Report) -> tuple[list[Row], list[Row]]:
    """(the rows to read first, all others). A figure with a gate is always among the first."""
    gates = tuple(r for r in report.gates if not r.export)
    gated = {r.gate.figure for r in gates}
    first: list[Row] = []
    rest: list[Row] = []
    for figure in report.verification.figures:
        wanted = figure.name in gated or not figure.name.endswith(_DETAILS)
        row = figure_row(figure, gates)
        (first if wanted and (figure.name in gated or len(first) < _HEADLINES) else rest).append(row)
    known = {f.name for f in report.verification.figures}
    lost = [r for r in gates if r.gate.figure not in known]
    first += [Row(r.gate.figure, DASH, DASH, DASH, DASH, DASH, _gate(r), "failed") for r in lost]
    return first, rest


def exports(report: Report) -> list[tuple[str, ...]]:
    """Rows of EXPORT_COLUMNS, one for each export, where there are several: shrunk, and in brackets the ratio to the
    dense model (latency: in the same precision; accuracy: in full precision)."""
    if not report.others:
        return []
    lengths = [int(f.name.rpartition(".")[2]) for f in report.verification.figures if f.name.startswith(TTFT)]
    usual = min(lengths, key=lambda length: abs(length - 128)) if lengths else 0
    names = ("size.export_mb", "accuracy.perplexity", "accuracy.kl", f"{TTFT}{usual}", "decode.tpot_ms")
    return [(name, *(_brief(made.figure(figure)) for figure in names)) for name, made in report.each.items()]


def _brief(figure: Figure | None) -> str:
    if figure is None or not figure.valid or figure.shrunk is None:
        return DASH
    return number(figure.shrunk) + (f" ({figure.ratio:.3f})" if figure.ratio is not None else "")


def sentence(report: Report) -> str:
    """The run in one sentence."""
    plan = report.plan
    asked = "" if abs(plan.ratio - plan.ratio_asked) < 5e-5 else f" ({percent(plan.ratio_asked)} asked)"
    how = f"criterion {plan.criterion}, allocation {plan.allocation}, layout {plan.layout}"
    parts = [f"{report.source.name}: {percent(plan.ratio)} of the block linear parameters removed{asked}; {how}"]
    for name, template in (
        ("accuracy.perplexity", "token perplexity {dense} → {shrunk}"),
        ("decode.tpot_ms", "time per output token {dense} → {shrunk} ms"),
        ("size.export_mb", "files {dense} → {shrunk} MB"),
    ):
        figure = report.verification.figure(name)
        if figure and figure.valid and figure.shrunk is not None and figure.baseline is not None:
            parts.append(template.format(dense=number(figure.baseline), shrunk=number(figure.shrunk)))
    return "; ".join(parts) + "."


def notes(report: Report) -> list[str]:
    """How the figures were measured, and why some are invalid."""
    return [
        *report.verification.notes,
        *invalid(report.verification),
        *_by_note([figure for figure in report.verification.figures if figure.note and figure.valid]),
        *(f"{name}: {note}" for name, made in report.others.items() for note in (*made.notes, *invalid(made))),
    ]


def invalid(report: VerificationReport) -> list[str]:
    """Why figures are, one line for all of one reason, but for what the notes say anyhow."""
    bad = [replace(figure, note=figure.note or "measured too badly") for figure in report.figures if not figure.valid]
    unsaid = [figure for figure in bad if not any(str(figure.note) in note for note in report.notes)]
    return _by_note([replace(figure, note=f"invalid: {figure.note}") for figure in unsaid])


def _by_note(figures: list[Figure]) -> list[str]:
    names: dict[str | None, list[str]] = {}
    for figure in figures:
        names.setdefault(figure.note, []).append(figure.name)
    return [f"{', '.join(of)}: {note}" for note, of in names.items()]


def same_tokens(made: Continuation) -> str:
    if made.dense is None:
        return f"{made.tokens} tokens"
    return (
        f"{made.same} of {made.tokens} tokens are the same before they part"
        if made.same < made.tokens
        else (f"all {made.tokens} tokens are the same")
    )


def removed(plan: PruningPlan) -> list[tuple[str, str, str, str]]:
    """Rows of REMOVED_COLUMNS: what follows from the sizes alone."""
    rows = []
    for name, field, unit in (
        ("parameters", "parameters", 1.0),
        ("block linear parameters", "block_parameters", 1.0),
        ("checkpoint (MB)", "bytes", 1e6),
        ("weights read per decoded token (MB)", "decode_bytes_per_token", 1e6),
        ("prefill FLOPs per token (MFLOP)", "prefill_flops_per_token", 1e6),
        ("KV cache per token (kB)", "kv_cache_bytes_per_token", 1e3),
    ):
        dense, shrunk = getattr(plan.dense_estimates, field), getattr(plan.estimates, field)
        ratio = _ratio(shrunk / dense) if dense else DASH
        rows.append((name, number(dense / unit), number(shrunk / unit), ratio))
    return rows


def ideal_speedups(dense: Estimates, shrunk: Estimates) -> str:
    decode = dense.decode_bytes_per_token / shrunk.decode_bytes_per_token if shrunk.decode_bytes_per_token else 1
    prefill = dense.prefill_flops_per_token / shrunk.prefill_flops_per_token if shrunk.prefill_flops_per_token else 1
    return f"ideal speed-up: decode {decode:.2f}x (bytes read), prefill {prefill:.2f}x (FLOPs)"


def blocks(report: Report) -> list[tuple[str, ...]]:
    """Rows of BLOCK_COLUMNS: kept of dense, and the relative output error after compensation."""
    errors = {b.block: b for b in report.pruning.blocks} if report.pruning else {}
    rows: list[tuple[str, ...]] = []
    for i, (dense, kept) in enumerate(zip(report.plan.dense, report.plan.blocks, strict=True)):
        trace = errors.get(i)
        rows.append(
            (
                str(i),
                *_kept(dense, kept),
                _error(trace.attention_error_before, trace.attention_error) if trace else DASH,
                _error(trace.ffn_error_before, trace.ffn_error) if trace else DASH,
            )
        )
    return rows


def texts(report: Report) -> list[tuple[str, str, str, str, str]]:
    """(use, name, tokens, sha256, licence and note)."""
    rows = []
    trained = report.recovery.texts if report.recovery else ()
    used = (("calibration", report.calibration), *(("recovery", part) for part in trained),
            ("evaluation", report.evaluation))  # fmt: skip
    for use, text in used:
        if text:
            remark = "; ".join(part for part in (text.license, text.note) if part)
            rows.append((use, text.name, f"{text.tokens:,}", text.sha256, remark))
    return rows


RECOVERY_COLUMNS = ("held-out text", "KL before", "KL after", "nats/token before", "nats/token after")


def recovery(made: Recovery) -> list[tuple[str, ...]]:
    """Rows of RECOVERY_COLUMNS: every domain."""
    first, kept = made.points[0].held_out, made.kept.held_out
    pairs = [(name, first[name], kept[name]) for name in first]
    return [
        (name, *(f"{value:.3f}" for value in (a.divergence, b.divergence, a.nll, b.nll))) for name, a, b in pairs
    ]  # fmt: skip


def recovery_sentence(made: Recovery) -> str:
    """What training did, in a line."""
    how = f"{made.method}, {made.tokens:,} tokens in {made.steps} steps, {seconds(made.seconds)}"
    ended = {
        "budget": "the budget was used up",
        "patience": "it got no better any more",
        "text": "all of the text was used",
        "instability": "it became unstable",
    }.get(made.stopped, made.stopped)
    if made.checkpoint is None:
        return f"Trained ({how}; {ended}) and no better for it: the pruned model is what is exported."
    return f"Trained ({how}; {ended}): {made.gain}.{_answers(made.chat)}"


def _answers(chat: ChatCheck | None) -> str:
    if chat is None:
        return ""
    return (
        f" Of {chat.asked} answers in its chat template that the dense model ends within {chat.tokens} tokens it ends "
        f"{chat.recovered}, and ended {chat.pruned} before training."
    )


def timings(report: Report) -> str:
    parts = [f"{stage} {seconds(value)}" for stage, value in report.seconds.items()]
    if report.pruning:
        p = report.pruning
        split = {
            "curvature": p.seconds_curvature,
            "allocation": p.seconds_allocation,
            "forward": p.seconds_forward,
            "Hessian": p.seconds_hessian,
            "selection": p.seconds_selection,
            "fit": p.seconds_fit,
        }
        named = ", ".join(f"{name} {seconds(value)}" for name, value in split.items() if value)
        parts.append(f"of pruning: {named}")
        parts.append(f"peak memory of pruning {p.peak_memory_bytes / 1e9:.2f} GB")
    return "; ".join(parts)


def versions(report: Report) -> str:
    """`slimexport 0.1.0, Python 3.11.7, torch 2.13.0, ...; cpu name, cores`."""
    environment = report.environment
    packages = environment.get("packages") or {}
    parts = [f"{name} {version}" for name, version in packages.items() if version]
    head = [f"{name} {environment[key]}" for name, key in (("slimexport", "slimexport"), ("Python", "python"))
            if environment.get(key)]  # fmt: skip
    machine = [str(environment[key]) for key in ("platform", "cpu") if environment.get(key)]
    if environment.get("cores"):
        machine.append(f"{environment['cores']} cores")
    return "; ".join(part for part in (", ".join(head + parts), ", ".join(machine)) if part)


def command(report: Report) -> str:
    """The command that does it again, from the resolved config: it needs no recipe and no earlier stage."""
    return command_of(report.config, report.source.name)


def command_of(config: Mapping[str, Any], model: str = "-") -> str:
    """What a config, as plain data, is on the command line."""
    words = ["slimexport", "run", str(config.get("model", model))]
    defaults = json.loads(RunConfig(model="-").model_dump_json())
    for name, value in config.items():
        if name == "model" or name not in defaults or value == defaults[name]:
            continue
        flag = "--" + ("gate" if name == "gates" else name).replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif name == "gates":
            words += [word for gate in value for word in (flag, _spec(gate))]
        elif name == "provider_option":  # each may hold commas
            words += [word for option in value for word in (flag, option)]
        elif value is not None:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]
    return shlex.join([*words, "-o", "out/"])


def sizes(plan: PruningPlan) -> list[tuple[str, ...]]:
    """Rows of the first four BLOCK_COLUMNS; neighbours of equal sizes share one ("8 to 11")."""
    rows: list[tuple[str, ...]] = []
    start = 0
    pairs = list(zip(plan.dense, plan.blocks, strict=True))
    for i, (dense, kept) in enumerate(pairs):
        if i + 1 < len(pairs) and pairs[i + 1] == pairs[i]:
            continue
        rows.append((str(i) if i == start else f"{start} to {i}", *_kept(dense, kept)))
        start = i + 1
    return rows


def _kept(dense: BlockSizes, kept: BlockSizes) -> tuple[str, str, str]:
    return (
        f"{kept.query_heads} of {dense.query_heads}",
        f"{kept.kv_groups} of {dense.kv_groups}",
        f"{kept.channels} of {dense.channels}",
    )


def figure_rows(report: VerificationReport) -> list[Row]:
    return [figure_row(figure) for figure in report.figures]


def _with_unit(figure: Figure) -> str:
    """`accuracy.kl (nats/token)`, but not `decode.tpot_ms (ms)`: that name has said it."""
    said = {*re.split(r"[._]", figure.name.lower()), ""}
    return figure.name if figure.unit.lower() in said else f"{figure.name} ({figure.unit})"


def _spec(gate: dict[str, object] | str) -> str:
    return gate if isinstance(gate, str) else str(Gate.model_validate(gate))


def _gate(result: GateResult) -> str:
    of = "" if result.gate.of == "shrunk" else f"{result.gate.of} "
    # Why is said beside the verdict; a table has no room for it.
    outcome = result.outcome if result.passed else result.outcome.upper()
    bound = str(result.gate).partition(result.gate.op)[2]
    return f"{of}{result.gate.op} {bound} {outcome}{', undecidable' if result.undecidable else ''}"


def _ratio(value: float | None) -> str:
    return DASH if value is None or not math.isfinite(value) else f"{value:.3f}"


def _error(before: float | None, after: float | None) -> str:
    return f"{number(after)} (was {number(before)})" if before else number(after)
