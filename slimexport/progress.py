"""Progress on stderr: a bar with its ETA on a terminal, rare plain lines in a log, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_LOG_EVERY = 5.0  # seconds between plain lines: a CI log that is seen to move, and can be read
_DRAW_EVERY = 0.1  # seconds between redrawings of the bar on a terminal


class Progress:
    """Says what a run is doing. Every method is cheap enough to be called from an inner loop.

    progress = Progress()
    with progress.stage("prune"):
        for i in range(30):
            progress.update(i + 1, 30, f"block {i}: error 0.013")
        progress.note("channels re-balanced")
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None):
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet
        self._terminal = _Terminal(self._stream) if not quiet and self._stream.isatty() else None
        self._stage = ""
        self._stage_started = self._loop_started = self._shown = time.monotonic()
        self._last_done = 0.0

    def stage(self, name: str) -> Progress:
        """Starts a stage of the road, and ends the one before it. `with progress.stage(...)` ends it on leaving."""
        self.finish()
        self._stage, self._stage_started = name, time.monotonic()
        self._restart()
        if self._terminal:
            self._terminal.start(name)
        else:
            self._line(f"{name} ...")
        return self

    def finish(self, how: str = "done in") -> None:
        """Ends the current stage, if there is one, with its seconds."""
        if self._terminal:
            self._terminal.stop()
        if self._stage:
            self._line(f"{self._stage}: {how} {seconds(time.monotonic() - self._stage_started)}")
            self._stage = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish("done in" if kind is None else "stopped after")

    def update(self, done: float, total: float, text: str = "") -> None:
        """`done` of `total` (blocks, tokens, bytes); a `done` below the last one starts a new loop and its ETA."""
        if self._quiet:
            return
        now = time.monotonic()
        if done < self._last_done:
            self._restart()
        self._last_done = done
        if now - self._shown < (_DRAW_EVERY if self._terminal else _LOG_EVERY) and done < total:
            return
        elapsed = now - self._loop_started
        left = elapsed / done * (total - done) if 0 < done < total and elapsed > 1 else None
        if self._terminal:
            self._shown = now
            self._terminal.draw(done, total, left, text)
        elif done < total or elapsed >= _LOG_EVERY:  # of a short loop the stage's own end line says enough
            self._shown = now
            eta = f", ETA {seconds(left)}" if left is not None else ""
            self._line(f"{self._stage}: {_count(done)}/{_count(total)}{eta}{f'  {text}' if text else ''}")

    def note(self, text: str) -> None:
        """A line that stays."""
        self._line(f"{self._stage}: {text}" if self._stage else text)

    def pin(self, text: str) -> None:
        """Lines that stand above the bar from now on, and go with it; a log has no such place, and gets none."""
        if self._terminal:
            self._terminal.pinned = text

    def _restart(self) -> None:
        self._loop_started = self._shown = time.monotonic()
        self._last_done = 0.0

    def _line(self, text: str) -> None:
        if self._terminal:
            self._terminal.line(text)
        elif not self._quiet:
            self._stream.write(text + "\n")
            self._stream.flush()


class _Terminal:
    """A bar by rich, drawn when it is told to: a thread that draws would run beside what is timed."""

    def __init__(self, stream: TextIO):
        from rich.console import Console

        self._console = Console(file=stream, highlight=False, soft_wrap=False)
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self.pinned = ""

    def start(self, name: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.text import Text

        pinned = self.pinned

        class Pinned(Progress):
            def get_renderables(self) -> Iterable[RenderableType]:
                if pinned:
                    yield Text(pinned, no_wrap=True, overflow="ellipsis")
                yield from super().get_renderables()

        self._bar = Pinned(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[counted]}", markup=False),
            TextColumn("{task.fields[text]}", style="dim", markup=False),
            console=self._console, auto_refresh=False, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task(name, total=None, counted="", text="")
        self._bar.start()
        self._bar.refresh()

    def draw(self, done: float, total: float, left: float | None, text: str) -> None:
        if self._bar is None or self._task is None:
            return
        counted = f"{_count(done)}/{_count(total)}" + (f", ETA {seconds(left)}" if left is not None else "")
        self._bar.update(self._task, completed=done, total=total, counted=counted, text=text, refresh=True)

    def line(self, text: str) -> None:
        self._console.print(text, markup=False)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


def seconds(value: float) -> str:
    """`0.4 s`, `48 s`, `3 min 20 s`, `1 h 05 min`."""
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _count(value: float) -> str:
    return f"{value:,.0f}"
