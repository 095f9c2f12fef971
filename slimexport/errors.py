"""Errors for people, and the exit codes that pipelines read.

Every error that a user can cause is a `SlimExportError`: one line that says what is wrong, where, and what
to do about it. Anything else that escapes is a bug in slimexport (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """What the process returns; the whole list is part of the public interface."""

    PASSED = 0
    INTERNAL = 1
    USAGE = 2  # Click's own
    GATE_FAILED = 3
    BAD_INPUT = 4
    NOT_REPRODUCED = 5


class SlimExportError(Exception):
    """Base of all errors with a documented exit code. `str(error)` is one line."""

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class UsageError(SlimExportError):
    """Flags that contradict each other or do not exist (exit 2)."""

    exit_code = ExitCode.USAGE


class BadInputError(SlimExportError):
    """A model, text, recipe, directory or device that cannot be used as given (exit 4)."""

    exit_code = ExitCode.BAD_INPUT


class NotReproducedError(SlimExportError):
    """A reloaded checkpoint or an exported graph that differs from what it was made from (exit 5)."""

    exit_code = ExitCode.NOT_REPRODUCED


class GateFailedError(SlimExportError):
    """At least one gate failed (exit 3)."""

    exit_code = ExitCode.GATE_FAILED


def first_sentence(error: BaseException) -> str:
    """What an error of torch's says before it goes into details."""
    return str(error).partition(". ")[0]


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns ' Did you mean X?' (with a leading space) for the closest known word, or ''."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def reason(error: BaseException, limit: int = 300) -> str:
    """A library's error in one line, with its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
