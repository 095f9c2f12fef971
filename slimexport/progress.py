"""Progress on stderr: one line that is rewritten on a terminal, rare plain lines in a log, nothing when quiet."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

_LOG_EVERY = 5.0  # seconds between plain lines: a CI log that is seen to move, and can be read
_DRAW_EVERY = 0.1  # seconds between redrawings of the line on a terminal


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
        self._terminal = not quiet and self._stream.isatty()
        self._stage = ""
        self._stage_started = self._loop_started = self._shown = time.monotonic()
        self._last_done = 0.0
        self._drawn = 0  # characters of the line that stands on the terminal

    def stage(self, name: str) -> Progress:
        """Starts a stage of the road, and ends the one before it. `with progress.stage(...)` ends it on leaving."""
        self.finish()
        self._stage, self._stage_started = name, time.monotonic()
        self._restart()
        if self._terminal:
            self._draw(name)
        else:
            self._line(f"{name} ...")
        return self

    def finish(self, how: str = "done in") -> None:
        """Ends the current stage, if there is one, with its seconds."""
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
        if not self._terminal and done >= total and now - self._loop_started < _LOG_EVERY:
            return  # a short loop: the stage's own end line says enough
        self._shown = now
        elapsed = now - self._loop_started
        eta = f", ETA {seconds(elapsed / done * (total - done))}" if 0 < done < total and elapsed > 1 else ""
        line = f"{self._stage}: {_count(done)}/{_count(total)}{eta}{f'  {text}' if text else ''}"
        if self._terminal:
            self._draw(line)
        else:
            self._line(line)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._line(f"{self._stage}: {text}" if self._stage else text)

    def _restart(self) -> None:
        self._loop_started = self._shown = time.monotonic()
        self._last_done = 0.0

    def _line(self, text: str) -> None:
        if self._quiet:
            return
        self._wipe()
        self._stream.write(text + "\n")
        self._stream.flush()

    def _draw(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        text = text if len(text) <= width else text[: width - 1] + "…"
        # Padded with blanks instead of an escape sequence: right on every terminal.
        self._stream.write("\r" + text.ljust(self._drawn))
        self._stream.flush()
        self._drawn = len(text)

    def _wipe(self) -> None:
        if self._drawn:
            self._stream.write("\r" + " " * self._drawn + "\r")
            self._drawn = 0


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
