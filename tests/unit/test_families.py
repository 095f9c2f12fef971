"""Every family against the conformance suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimexport.architectures import registry
from slimexport.testing import CHECKS, VARIANTS, tiny_config

MODELS = {name: (name, {}) for name in registry.names()} | VARIANTS


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("model", MODELS)
def test_conformance(model: str, check: str, tmp_path: Path) -> None:
    family, changes = MODELS[model]
    CHECKS[check](tiny_config(family, **changes), tmp_path)
