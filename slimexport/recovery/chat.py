"""Whether a model that was trained still answers in its chat template."""

from __future__ import annotations

from typing import Any

from slimexport.artifacts import ChatCheck
from slimexport.texts import chat

ASKED = 16  # prompts of ours
ANSWER = 64  # tokens: what a model of 100 M parameters writes in a few seconds
LOST = 0.5  # of the answers that the dense model ends: with fewer, something is said


class Chat:
    """Asks `teacher` what it answers; `check` compares what became of a student with that."""

    def __init__(self, teacher: Any, tokenizer: Any):
        self._tokenizer = tokenizer
        self._asked = [] if chat.unable(tokenizer) else chat.ended(teacher, tokenizer, ASKED, ANSWER)

    def ended(self, student: Any) -> int:
        """How many of the answers that the teacher ends `student` ends as well."""
        if not any(self._asked):
            return 0
        own = chat.ended(student, self._tokenizer, ASKED, ANSWER)
        return sum(mine and theirs for mine, theirs in zip(own, self._asked, strict=True))

    def check(self, before: int, after: int) -> ChatCheck | None:
        """None where there is nothing to compare with."""
        return ChatCheck(sum(self._asked), ANSWER, before, after) if any(self._asked) else None


def warning(found: ChatCheck) -> str | None:
    """What to do about it where training took the model away from its template."""
    if found.recovered >= found.pruned or found.recovered >= LOST * found.asked:
        return None
    return (
        f"it ends {found.recovered} of {found.asked} answers in its chat template, and ended {found.pruned} before "
        "training: give chat a larger part of --recover-text"
    )
