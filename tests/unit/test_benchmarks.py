"""What the documents say is what was measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_tables_are_those_of_the_committed_results() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "render.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_place_is_found_and_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import render

    text = "before\n<!-- table: cost -->\nold\n<!-- /table -->\nafter\n"
    new = render.rendered(text)
    assert new.startswith("before\n<!-- table: cost -->\n| model |")
    assert new.endswith("|\n<!-- /table -->\nafter\n")
    assert "old" not in new
    assert render.rendered(new) == new
    with pytest.raises(KeyError):
        render.rendered("<!-- table: nothing -->\n<!-- /table -->")
    for document in render.DOCUMENTS:
        assert render.PLACE.search(document.read_text(encoding="utf-8"))
