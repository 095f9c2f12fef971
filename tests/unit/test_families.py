"""Every family against the conformance suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimexport.targets.builders import mobius
from slimexport.testing import CHECKS, kinds, tiny_config

IN_CI = ("gpt2", "falcon", "phi3", "qwen2_moe")
MODELS = kinds()


def cases() -> list[object]:
    """What takes longer than a second is slow: a graph that is traced (half a minute), another process (ten seconds).
    Of these CI does a few kinds, `make test-full` all."""
    made = []
    for model, (family, changes) in MODELS.items():
        traced = not mobius.knows(tiny_config(family, **changes))
        for check in CHECKS:
            marks = []
            if check == "fresh process" or (traced and check == "exported"):
                marks = [pytest.mark.slow, *([] if model in IN_CI else [pytest.mark.long])]
            made.append(pytest.param(model, check, marks=marks))
    return made


@pytest.mark.parametrize(("model", "check"), cases())
def test_conformance(model: str, check: str, tmp_path: Path) -> None:
    family, changes = MODELS[model]
    CHECKS[check](tiny_config(family, **changes), tmp_path)
