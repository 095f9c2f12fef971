"""The Dockerfile's own install and entry commands, in a clean environment: there is no Docker daemon to do it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).parents[2]


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, rest), continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]  # type: ignore[misc]


def test_install_and_entry_commands(tmp_path: Path) -> None:
    source = tmp_path / "src"
    for instruction, rest in dockerfile():
        if instruction == "COPY":
            *names, _ = rest.split()
            for name in names:
                place = source / name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(ROOT / name, place) if (ROOT / name).is_dir() else shutil.copy(ROOT / name, place)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    environment = {
        **os.environ, "PATH": f"{tmp_path / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}", "EXTRA": "cpu",
        "PYTHONPATH": "",
    }  # fmt: skip
    for instruction, rest in dockerfile():
        if instruction == "RUN" and "pip install" in rest:
            # Where torch comes from is the one thing that a build argument changes; here it is pip's own index.
            command = rest.replace('--index-url "${TORCH_INDEX}"', "").replace("file:///src", source.as_uri())
            subprocess.run(["bash", "-euc", command], check=True, cwd=source, env=environment, timeout=800)
    # From outside the sources, so that what was installed is what answers.
    entry = ["bash", "-euc", "slimexport --help && slimexport plan smollm2-135m"]
    done = subprocess.run(entry, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Usage: slimexport" in done.stdout
    assert "ideal speed-up" in done.stdout
    checked = subprocess.run(["slimexport", "doctor"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert "optimum-cli slimexport` is registered" in checked.stdout
