"""The report in its five forms."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import xml.etree.ElementTree as ET
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import junitparser
import numpy as np
import pytest
import report_data
from jsonschema import Draft202012Validator
from markdown_it import MarkdownIt

from slimexport.artifacts import BlockTrace, Continuation, Figure, ModelSource, VerificationReport
from slimexport.cli import main as cli
from slimexport.config import RunConfig
from slimexport.errors import BadInputError
from slimexport.gates.decide import evaluate
from slimexport.gates.declared import Gate
from slimexport.options import given
from slimexport.reporting import (
    PruningSummary,
    Report,
    compare,
    html,
    junit,
    load_report,
    markdown,
    plan_text,
    plots,
    published,
    summary,
    to_json,
    view,
    write_report,
)

FAILING = ("speedup(decode.tpot_ms)>=1.5", "prefill.ttft_ms.128<=400", "ratio(memory.peak_rss_mb)<=1", "typo<=1")
EVIL = "<script>alert(1)</script>|`x`&amp; \"'\x00\n# heading"


def evil_report() -> Report:
    figure = Figure(EVIL, EVIL, valid=False, note=EVIL)
    made = report_data.report(
        (),
        source=ModelSource(EVIL, "hub", EVIL, EVIL, EVIL, "float32"),
        verification=VerificationReport(
            (figure, Figure("decode." + EVIL, EVIL, 1.0, 2.0, 0.5, 0.4, 0.6, 0.5)),
            notes=(EVIL,),
            continuations=(Continuation(EVIL, EVIL, EVIL, 40, 3),),
        ),
        environment={"cpu": EVIL, "packages": {EVIL: EVIL}},
        seconds={EVIL: 1.0},
        command=EVIL,
    )
    text = dataclasses.replace(made.calibration, name=EVIL, license=EVIL, note=EVIL)
    plan = dataclasses.replace(made.plan, criterion=EVIL, notes=(EVIL,))
    return dataclasses.replace(made, calibration=text, plan=plan)


# ---------------------------------------------------------------------------------------------------------- content


def test_verdicts() -> None:
    assert report_data.report().verdict == "PASSED: all 2 gates held."
    assert report_data.report(("accuracy.kl<=1",)).verdict == "PASSED: the gate held."
    assert report_data.report(()).verdict == "PASSED: no gate was set, so nothing was required."
    failing = report_data.report(("accuracy.kl<=1", "accuracy.kl<=0.1"))
    assert failing.verdict == "FAILED: 1 of 2 gates: accuracy.kl 0.241 <= 0.1 does not hold: 141 % too much."
    assert not failing.passed


def test_rows_show_dashes_intervals_and_invalid_figures() -> None:
    rows = {row.name: row for row in view.tables(report_data.report(FAILING))[0]}
    assert rows["memory.peak_rss_mb"].cells[1:4] == (view.DASH, "812", view.DASH)
    assert rows["decode.tpot_ms"].ratio == "0.760 (0.744 to 0.777)"
    invalid = rows["prefill.ttft_ms.128"]
    assert invalid.shrunk == "invalid"
    said = "prefill.ttft_ms.128: invalid: spread 38 % of the median over 10 runs"
    assert said in view.notes(report_data.report(FAILING))
    assert (invalid.dense, invalid.ratio) == (view.DASH, view.DASH)
    assert rows["decode.tpot_ms"].gate == "speedup >= 1.5 FAILED"
    assert rows["typo"].gate == "<= 1 FAILED, undecidable"


def test_an_invalid_number_is_printed_nowhere() -> None:
    figure = Figure("prefill.ttft_ms.128", "ms", 987.25, 986.25, 1.001, valid=False, note="noise")
    made = report_data.report((), verification=VerificationReport((figure,)))
    shown = re.sub(r"<svg.*?</svg>", "", html.render(made), flags=re.DOTALL)  # whose coordinates may be any number
    for text in (markdown.render(made), shown, summary(made)):
        assert "987" not in text
        assert "986" not in text
        assert "1.001" not in text
        assert "invalid" in text


def test_details_are_folded_unless_a_gate_is_on_them() -> None:
    first, rest = view.tables(report_data.report(()))
    assert "decode.tpot_ms.p90" in [row.name for row in rest]
    first, rest = view.tables(report_data.report(("decode.tpot_ms.p90<=20",)))
    assert "decode.tpot_ms.p90" in [row.name for row in first]


def test_many_figures_leave_a_short_first_table() -> None:
    figures = tuple(Figure(f"f{i}", "", float(i)) for i in range(60))
    first, rest = view.tables(report_data.report(("f59<=1",), verification=VerificationReport(figures)))
    assert len(first) <= 15
    assert len(first) + len(rest) == 60
    assert first[-1].name == "f59"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (3.0, "3"), (134515008, "134,515,008"), (23.371, "23.37"), (1.9e-4, "1.90e-04"),
     (12345.6, "12,346"), (math.nan, "nan"), (math.inf, "inf"), (-0.5, "-0.5")],
)  # fmt: skip
def test_number(value: float | None, text: str) -> None:
    assert view.number(value) == text


def test_equal_neighbours_share_a_row_of_the_plan() -> None:
    rows = view.sizes(report_data.plan())
    assert rows[0] == ("0 to 1", "9 of 9", "3 of 3", "1472 of 1536")
    assert rows[-1][0] == "29"
    assert "ideal speed-up" in plan_text(report_data.plan())


def test_command_gives_the_same_config() -> None:
    config = RunConfig(
        model="a model", ratio=0.3, baseline=False, trust_remote_code=True, target=("onnx", "genai"), max_kl=0.2,
        prompt_lengths=(16,), gates=("ratio(a)<=1.5",), baseline_cache=Path("/c c"),  # type: ignore[arg-type]
    )  # fmt: skip
    words = shlex.split(view.command(report_data.report(config=config.model_dump(mode="json"))))
    assert words[:3] == ["slimexport", "run", "a model"]
    command = cli.commands["run"]
    with command.make_context("run", words[2:]) as ctx:
        assert RunConfig(model="a model", **given(ctx)) == config


def test_an_undecided_gate_that_only_warns() -> None:
    """Passed, but neither silently nor as if it had held."""
    gates = evaluate(
        (Gate.parse("prefill.ttft_ms.128<=400"),), report_data.report().verification, undecided_fails=False
    )
    made = dataclasses.replace(report_data.report(()), gates=gates)
    assert made.passed
    assert made.verdict.startswith(
        "PASSED: no gate failed, but 1 of 1 could not be decided: prefill.ttft_ms.128 <= 400"
    )
    row = next(row for row in view.tables(made)[0] if row.gate)
    assert (row.state, row.gate) == ("undecided", "<= 400 UNDECIDED, undecidable")
    suite = ET.fromstring(junit.render(made)).find("testsuite")
    assert suite is not None
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")
    assert suite.find("testcase/skipped") is not None


# ------------------------------------------------------------------------------------------------------------- JSON


def test_round_trip(tmp_path: Path) -> None:
    for gates in ((), FAILING):
        made = report_data.report(gates)
        write_report(made, tmp_path / "report")
        assert load_report(tmp_path / "report") == made
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "junit.xml",
        "report",
        "report.html",
        "report.json",
        "report.md",
    ]


def test_json_is_strict_and_whole() -> None:
    figure = Figure("a", "", math.nan, math.inf, 1.0)
    made = report_data.report(FAILING, verification=VerificationReport((figure,), latency={"runs": [math.nan, 1.5]}))
    data = json.loads(json.dumps(to_json(made), allow_nan=False))
    assert data["schema_version"] == 1
    assert data["passed"] is False
    assert data["verdict"] == made.verdict
    assert data["gates"][0]["gate"] == {
        "figure": "decode.tpot_ms",
        "of": "speedup",
        "op": ">=",
        "bound": 1.5,
        "unit": "",
        "tolerance": 0.0,
    }
    assert data["verification"]["latency"] == {"runs": [None, 1.5]}
    assert data["plan"]["blocks"][0]["channels"] == 1472
    assert len(data["pruning"]["blocks"]) == report_data.BLOCKS
    assert data["config"]["model"] == "smollm2-135m"


def test_report_without_pruning_and_texts(tmp_path: Path) -> None:
    made = report_data.report(
        (), pruning=None, calibration=None, evaluation=None, exports={}, environment={}, seconds={}
    )
    write_report(made, tmp_path / "r")
    assert load_report(tmp_path / "r") == made
    assert "## Texts" not in markdown.render(made)


@pytest.mark.parametrize("made", [report_data.report(), report_data.report(FAILING), evil_report()])
def test_json_is_what_the_published_schema_says(made: Report) -> None:
    assert published.published() == published.generated(), "python -m slimexport.reporting.published writes it again"
    Draft202012Validator.check_schema(published.published())
    validator = Draft202012Validator(published.published())
    data = json.loads(json.dumps(to_json(made)))
    validator.validate(data)
    assert not validator.is_valid({**data, "more": 1})
    assert not validator.is_valid({**data, "passed": "yes"})
    assert not validator.is_valid({**data, "gates": [{}]})


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema_version": 99}', '{"gates": [{}]}', '{"plan": 1}'])
def test_broken_report_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(BadInputError):
        load_report(tmp_path)


def test_missing_report(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist"):
        load_report(tmp_path)


def test_pruning_summary_from_a_trace() -> None:
    trace = tuple(
        BlockTrace(i, (0,), (0,), (1, 2), 0.4, 0.1, 0.5, 0.2, 1.0, 2.0, 3.0, 0.01, 100 + i, ("dead",)) for i in range(2)
    )
    made = PruningSummary.from_trace(trace)
    assert (made.seconds_forward, made.seconds_hessian, made.seconds_selection) == (2.0, 4.0, 6.0)
    assert made.peak_memory_bytes == 101
    assert made.blocks[1].seconds == 6.0
    assert made.blocks[1].notes == ("dead",)


def test_timings_name_only_what_was_done() -> None:
    said = view.timings(report_data.report())
    assert "of pruning: allocation 33 s, forward 21 s, Hessian 14 s, selection 18 s" in said
    assert "curvature" not in said


# -------------------------------------------------------------------------------------------------- Markdown, HTML


def test_markdown_says_the_verdict_first_and_all_else() -> None:
    text = markdown.render(report_data.report(FAILING))
    lines = text.splitlines()
    assert lines[0] == "# FAILED: 4 of 4 gates"
    assert lines[1].startswith("- decode.tpot")
    assert "| figure | dense | shrunk | ratio | ideal | floor | gate |" in lines
    assert "23.37 → 30.1" in text
    assert "- accuracy.perplexity: 16352 tokens scored, window and stride 512" in lines
    assert "12" * 32 in text
    assert "| 29 | 6 of 9 | 2 of 3 |" in text
    assert "slimexport run smollm2-135m" in text
    assert "torch 2.13.0+cpu" in text
    for table in text.split("\n\n"):  # every row of a table has its header's columns
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in rows}) <= 1


def test_markdown_lets_no_markup_through() -> None:
    text = markdown.render(evil_report())
    fence = text.index("```sh")
    prose = text[:fence] + text[text.index("```\n", fence + 5) :]
    assert "<script" not in prose
    assert "\n# heading" not in prose
    assert "&amp;amp;" in prose


class Checker(HTMLParser):
    """Counts tags; fails on what is not closed."""

    VOID = frozenset({"meta", "rect", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.targets: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [str(value) for name, value in attrs if name == "id"]
        self.targets |= {str(value) for name, value in attrs if name == "href"}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("made", [report_data.report(), report_data.report(FAILING), evil_report()])
def test_html_is_well_formed_and_loads_nothing(made: Report) -> None:
    text = html.render(made)
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert checker.seen.isdisjoint({"script", "link", "img", "iframe", "a", "heading"})
    assert not [name for name in checker.attributes if name.startswith("on") or name == "src"]
    assert checker.targets <= {f"#{name}" for name in checker.ids}, "only what is in the file"
    assert len(checker.ids) == len(set(checker.ids))
    assert len(text) < 1.5e6
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "http://" not in text
    assert "https://" not in text


def test_html_escapes_everything() -> None:
    text = html.render(evil_report())
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def measured_report() -> Report:
    """With the record that a run keeps of its times."""
    rng = np.random.default_rng(0)

    def runs(scale: float) -> list[list[float]]:
        return (scale * rng.normal(1, 0.02, (10, 64))).tolist()

    latency = {
        "ttft_ms": {m: {"128": [s] * 10, "512": [4 * s] * 10} for m, s in (("shrunk", 90.0), ("baseline", 120.0))},
        "itl_ms": {"shrunk": runs(12.0), "baseline": runs(16.0)},
    }
    figures = tuple(dataclasses.replace(figure, valid=True) for figure in report_data.FIGURES)
    said = Continuation("In 1887 the", " bridge was <b>rebuilt</b>", " bridge was sold", 40, 2)
    made = report_data.report((), verification=VerificationReport(figures, latency=latency, continuations=(said,)))
    return dataclasses.replace(made, exports={"onnx": made.exports["onnx"]} if "onnx" in made.exports else made.exports)


def test_pictures_say_in_words_what_they_show() -> None:
    drawn = dict(plots.all_of(measured_report()))
    titles = [caption.partition(":")[0] for caption in drawn]
    assert titles == [
        "Speed-up beside its ideal",
        "Time to the first token by prompt length",
        "Time between output tokens",
        "Relative error of each block's output, without and with compensation",
        "Size and token perplexity over dense",
    ]
    for caption, svg in drawn.items():
        assert f'<svg role="img" aria-label="{escape(caption)}"' in svg
        assert "#0102" not in svg, "a stand-in for a colour was left"
        assert "font-family" not in svg
        assert "xmlns" not in svg
    assert "128 tokens 120 → 90 ms" in list(drawn)[1]
    assert plots.all_of(measured_report()) == plots.all_of(measured_report()), "the same bytes again"


@pytest.mark.parametrize("errors", [(0.3, 0.6), (1e-9, 0.5)], ids=["less than a decade", "nine of them"])
def test_errors_have_numbers_on_their_axis(errors: tuple[float, float]) -> None:
    made = measured_report()
    assert made.pruning is not None
    low, high = errors
    blocks = tuple(
        dataclasses.replace(
            block, attention_error_before=high, attention_error=low, ffn_error_before=high, ffn_error=low
        )
        for block in made.pruning.blocks
    )
    svg = dict(plots.all_of(dataclasses.replace(made, pruning=dataclasses.replace(made.pruning, blocks=blocks))))
    (drawn,) = (text for caption, text in svg.items() if caption.startswith("Relative error"))
    assert "mathdefault" not in drawn
    assert (">0.3<" if low > 0.01 else ">0.1<") in drawn


def test_the_dense_model_is_drawn_in_full_precision_alone() -> None:
    """Perplexity is held to that; what a rounded one has of it was not measured."""
    made = measured_report()
    (name,) = made.exports.keys() & made.each.keys()
    rounded = dataclasses.replace(made.exports[name], precision="int4")
    for exports, wanted in ((made.exports, True), ({name: rounded}, False)):
        captions = [caption for caption, _ in plots.all_of(dataclasses.replace(made, exports=exports))]
        (caption,) = (caption for caption in captions if caption.startswith("Size and token"))
        assert ("dense (" in caption) == wanted


def test_what_is_invalid_or_missing_is_not_drawn() -> None:
    made = measured_report()
    bad = tuple(dataclasses.replace(figure, valid=False) for figure in made.verification.figures)
    left = plots.all_of(dataclasses.replace(made, verification=dataclasses.replace(made.verification, figures=bad)))
    assert [caption.partition(":")[0][:14] for caption, _ in left] == ["Relative error", "Size and token"]
    assert plots.all_of(report_data.report((), verification=VerificationReport(()), pruning=None)) == []


def test_continuations_stand_beside_each_other() -> None:
    made = measured_report()
    page = html.render(made)
    assert "<blockquote> bridge was &lt;b&gt;rebuilt&lt;/b&gt;</blockquote>" in page
    assert "2 of 40 tokens are the same before they part" in page
    assert "bridge was sold" in markdown.render(made)


def test_html_has_a_bar_for_every_block() -> None:
    text = html.render(report_data.report())
    assert text.count("<title>block ") == 2 * report_data.BLOCKS
    assert "block 29: 928 of 1536 channels" in text


# ------------------------------------------------------------------------------------------------- JUnit, terminal


def test_junit_has_a_case_for_every_gate() -> None:
    root = ET.fromstring(junit.render(report_data.report((*FAILING, "accuracy.kl<=1"))))
    suite = root.find("testsuite")
    assert suite is not None
    assert (root.tag, suite.get("tests"), suite.get("failures")) == ("testsuites", "5", "4")
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == [*FAILING, "accuracy.kl<=1"]
    kinds = [f.get("type") if (f := case.find("failure")) is not None else None for case in cases]
    assert kinds == ["failed", "undecidable", "undecidable", "undecidable", None]


@pytest.mark.parametrize("made", [report_data.report(), report_data.report(FAILING), evil_report()])
def test_junit_is_read_by_others(made: Report) -> None:
    (suite,) = junitparser.JUnitXml.fromstring(junit.render(made).encode())
    assert (suite.tests, suite.failures) == (len(made.gates), sum(result.lost for result in made.gates))
    for case, result in zip(suite, made.gates, strict=True):
        assert [type(item) for item in case.result] == ([junitparser.Failure] if result.lost else [])


@pytest.mark.parametrize("made", [report_data.report(), report_data.report(FAILING), evil_report()])
def test_markdown_is_read_by_others(made: Report) -> None:
    """By a CommonMark parser with GitHub's tables: every table is one, and the only HTML is what folds."""
    text = markdown.render(made)
    assert len(text) < 65536, "a comment on GitHub"
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    ours = re.compile(r"</?(details|summary)>")
    for token in [token for top in tokens for token in (top, *(top.children or ()))]:
        if token.type in ("html_block", "html_inline"):
            assert "<" not in ours.sub("", token.content)
    assert sum(token.type == "table_open" for token in tokens) == sum(
        line.startswith("| ---") for line in text.splitlines()
    )


def test_junit_survives_any_name_and_no_gates() -> None:
    root = ET.fromstring(junit.render(evil_report()))
    assert root.get("tests") == "0"
    assert "<script>" in root.find(".//property").get("value")  # type: ignore[union-attr,operator]


def test_share_of_the_ideal_and_multiple_of_the_floor() -> None:
    lower = Figure("decode.tpot_ms", "ms", 12.0, 16.0, 0.75, ideal=0.7, floor=8.0)
    row = view.figure_row(lower)
    assert (row.ideal, row.floor) == ("0.700 (93%)", "1.50 x")
    higher = Figure("decode.tokens_per_s", "tokens/s", 80, 60, 1.333, ideal=1.4286, better="higher")
    assert view.figure_row(higher).ideal == "1.429 (93%)"
    assert view.figure_row(Figure("size.export_mb", "MB", 1.0, 2.0, 0.5)).floor == view.DASH
    assert view.figure_row(dataclasses.replace(lower, valid=False)).floor == view.DASH


def test_summary_fits_a_terminal(tmp_path: Path) -> None:
    text = summary(report_data.report(FAILING), tmp_path / "report")
    assert text.startswith("FAILED: 4 of 4 gates: decode.tpot_ms speedup 1.316 >= 1.5 does not hold: 12 % too little; ")
    assert str(tmp_path / "report" / "report.md") in text
    table = text[text.index("figure  ") : text.index("report:")]
    assert "prefill.ttft_ms.128: invalid: spread 38 %" in table
    assert max(len(line) for line in table.splitlines()) <= 120


def test_runs_beside_each_other() -> None:
    one = report_data.report()
    machine = dataclasses.replace(one, environment={**one.environment, "cpu": "Z80 <b>"})
    reports = {"out/a": one, "out/<b>": machine}
    text = compare.to_text(reports)
    assert text.splitlines()[0].split() == ["out/a", "out/<b>"]
    assert "decode.tpot_ms" in text
    assert "12.31 (0.760)" in text
    assert "prefill.ttft_ms.128" in text
    assert "invalid" in text
    assert "These are different machines: out/a Some CPU @ 2.4 GHz, out/<b> Z80 <b>." in text
    assert "different models" not in text
    page = compare.to_html(reports)
    assert "<b>" not in page
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert "| decode.tpot_ms | 12.31 (0.760) | 12.31 (0.760) |" in compare.to_markdown(reports)
    assert list(compare.to_json(reports)["reports"]) == ["out/a", "out/<b>"]
