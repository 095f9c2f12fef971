"""The site builds without a warning, and what it says about messages is what the tool says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    words = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "kept")]
    done = subprocess.run([*words, str(DOCS), str(tmp_path / "site")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "site" / "cli.html").read_text(encoding="utf-8")
    assert "--calibration-tokens" in commands, "made from Click"
    pages = {page.stem for page in DOCS.glob("*.md")}
    assert pages <= {page.stem for page in (tmp_path / "site").glob("*.html")}


def test_messages_are_those_of_the_tool() -> None:
    """Every heading of the page is part of a message in the package, or of the operating system's."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "slimexport").rglob("*.py"))
    plain = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that go on in the next line
    headings = re.findall(r"^## (.*)$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    theirs = {"No space left on device", "Killed"}
    assert len(headings) > 10
    assert [heading for heading in headings if heading not in theirs and heading not in plain] == []


def test_links_lead_somewhere() -> None:
    """Sphinx sees those of docs/; these are the README's."""
    for target, anchor in re.findall(r"\]\((docs/[\w.-]+)(?:#([\w-]+))?\)", (ROOT / "README.md").read_text()):
        page = ROOT / target
        assert page.is_file(), target
        titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
        assert not anchor or anchor in slugs, f"{target}#{anchor}"
