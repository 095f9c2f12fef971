"""Every family against the conformance suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimexport.architectures import registry
from slimexport.targets.builders import mobius
from slimexport.testing import CHECKS, VARIANTS, tiny_config

MODELS = {name: (name, {}) for name in registry.names()} | VARIANTS


def cases() -> list[object]:
    """A graph that is traced takes half a minute, one that mobius builds a second."""
    made = []
    for model, (family, changes) in MODELS.items():
        traced = not mobius.knows(tiny_config(family, **changes))
        for check in CHECKS:
            made.append(pytest.param(model, check, marks=[pytest.mark.slow] if traced and check == "exported" else []))
    return made


@pytest.mark.parametrize(("model", "check"), cases())
def test_conformance(model: str, check: str, tmp_path: Path) -> None:
    family, changes = MODELS[model]
    CHECKS[check](tiny_config(family, **changes), tmp_path)
