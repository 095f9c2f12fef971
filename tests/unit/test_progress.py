"""Progress: a bar on a terminal, rare plain lines in a log, nothing when quiet."""

from __future__ import annotations

import io
import re
import threading

import pytest

from slimexport import progress as module
from slimexport.progress import Progress, seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_log_has_stage_lines_and_an_update_every_five_seconds(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    with progress.stage("prune"):
        for block in range(30):
            clock[0] += 1
            progress.update(block + 1, 30, f"error 0.{block}")
        progress.note("channels re-balanced")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "prune ..."
    assert lines[1] == "prune: 5/30, ETA 25 s  error 0.4"
    assert lines[-2:] == ["prune: channels re-balanced", "prune: done in 30 s"]
    assert len(lines) == 1 + 6 + 2
    assert "\r" not in stream.getvalue()


def test_short_loops_leave_no_lines_in_a_log(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(stream=stream).stage("load") as progress:
        progress.update(1, 2)
        progress.update(2, 2)
    assert stream.getvalue() == "load ...\nload: done in 0.0 s\n"


def shown(stream: io.StringIO) -> str:
    """What was written, without the terminal's sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_terminal_has_a_bar_with_eta_and_text_and_leaves_the_last_line_alone(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with Progress(stream=stream).stage("prune") as progress:
        for block in range(3):
            clock[0] += 2
            progress.update(block + 1, 3, f"block {block}: [error] 0.01")
        progress.note("channels [bold]re-balanced")
    text = shown(stream)
    assert "1/3, ETA 4.0 s block 0: [error] 0.01" in text
    assert "2/3, ETA 2.0 s block 1" in text
    assert "prune: channels [bold]re-balanced\n" in text, "what is in brackets is no markup"
    assert text.rstrip().endswith("prune: done in 6.0 s")
    assert stream.getvalue().rindex("\x1b[2K") < stream.getvalue().rindex("prune: done"), "the bar is wiped"


def test_terminal_bar_never_wraps(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    with Progress(stream=stream).stage("prune") as progress:
        clock[0] += 2
        progress.update(1, 3, "x" * 200)
    assert max(map(len, re.split(r"[\r\n]", shown(stream)))) <= 60


def test_a_pinned_table_stands_above_the_bar_and_goes_with_it(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream, log = Terminal(), io.StringIO()
    for place in (stream, log):
        progress = Progress(stream=place)
        progress.pin("ratio  MB\n0.1   [400]")
        with progress.stage("prune"):
            clock[0] += 2
            progress.update(1, 3)
    assert re.search(r"0\.1   \[400\]\s*prune", shown(stream))
    assert shown(stream).rindex("[400]") < shown(stream).rindex("done in")
    assert "400" not in log.getvalue()


def test_no_thread_draws_beside_what_is_timed(clock: list[float]) -> None:
    before = threading.active_count()
    with Progress(stream=Terminal()).stage("verify"):
        assert threading.active_count() == before


def test_quiet_says_nothing(clock: list[float]) -> None:
    stream = Terminal()
    with Progress(quiet=True, stream=stream).stage("prune") as progress:
        clock[0] += 60
        progress.update(1, 3)
        progress.note("x")
    assert stream.getvalue() == ""


def test_a_new_loop_gets_its_own_eta(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(stream=stream).stage("verify") as progress:
        clock[0] += 100
        progress.update(10, 10)
        progress.update(0, 10)
        clock[0] += 6
        progress.update(1, 10)
    assert "verify: 1/10, ETA 54 s" in stream.getvalue()


def test_failed_stage_and_stage_without_with(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.stage("load")
    clock[0] += 12
    with pytest.raises(ValueError, match="x"), progress.stage("prune"):
        raise ValueError("x")
    assert stream.getvalue().splitlines() == [
        "load ...", "load: done in 12 s", "prune ...", "prune: stopped after 0.0 s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (48.2, "48 s"), (200, "3 min 20 s"), (3900, "1 h 05 min")]
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text
