"""`optimum-cli slimexport ...` does what `slimexport ...` does, from the editable install and from the wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = "optimum/commands/register/register_slimexport.py"

pytest.importorskip("optimum.commands.base")

# What the console script `optimum-cli` runs; in this form it also works where scripts are not installed.
OPTIMUM = "from optimum.commands.optimum_cli import main; main()"


def optimum(*words: str, python: str = sys.executable, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    script = f"import sys; sys.argv[0] = 'optimum-cli'; {OPTIMUM}"
    return subprocess.run([python, "-c", script, *words], capture_output=True, text=True, timeout=300, cwd=cwd)


def slimexport(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "slimexport.cli", *words], capture_output=True, text=True)


def same(text: str) -> str:
    """Help and errors name the program; nothing else may differ."""
    return text.replace("optimum-cli slimexport", "slimexport").replace("python -m slimexport.cli", "slimexport")


def test_no_init_file_closes_the_namespace() -> None:
    assert (ROOT / "plugins" / PLUGIN).is_file()
    assert not list((ROOT / "plugins").rglob("__init__.py"))


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["plan", "--help"], ["--version"]])
def test_help_is_clicks(words: list[str]) -> None:
    through, direct = optimum("slimexport", *words), slimexport(*words)
    assert through.returncode == direct.returncode == 0
    assert same(through.stdout).split() == same(direct.stdout).split()


def test_errors_and_exit_codes_are_passed_on(tmp_path: Path) -> None:
    for words in (["plna"], ["report", str(tmp_path / "none")], ["run", "m", "-o", str(tmp_path), "--ratio", "2"]):
        through, direct = optimum("slimexport", *words), slimexport(*words)
        assert through.returncode == direct.returncode in (2, 4)
        assert same(through.stderr.splitlines()[-1]) == same(direct.stderr.splitlines()[-1])


def test_optimum_lists_the_command_and_keeps_its_own() -> None:
    done = optimum("--help")
    assert done.returncode == 0
    assert "slimexport" in done.stdout
    assert "export" in done.stdout
    assert optimum("env", "--help").returncode == 0


@pytest.mark.slow
def test_from_the_wheel(tmp_path: Path) -> None:
    """Builds the wheel, installs it alone into a fresh environment that sees this one's packages, and runs it."""
    source = tmp_path / "source"  # a build leaves files behind, and stale ones end up in the next wheel
    source.mkdir()
    for name in ("slimexport", "plugins"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert PLUGIN in names
    assert not [name for name in names if name.startswith("optimum") and name.endswith("__init__.py")]
    assert not [
        name for name in names if name.split("/")[0] not in ("slimexport", "optimum") and ".dist-info" not in name
    ]
    assert "slimexport/py.typed" in names

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    site = Path(
        subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", site, wheel],
        check=True, capture_output=True,
    )  # fmt: skip
    # A plain path entry: unlike site.addsitedir it does not run the editable install's .pth file, so that the
    # wheel is the only slimexport there.
    here = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "packages.pth").write_text(here + "\n")
    where = subprocess.check_output(
        [python, "-c", "import slimexport; print(slimexport.__file__)"], text=True, cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(tmp_path)

    done = optimum("slimexport", "--help", python=python, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "optimum-cli slimexport [OPTIONS] COMMAND" in done.stdout
    assert "--ratio" in optimum("slimexport", "plan", "--help", python=python, cwd=tmp_path).stdout
    console = subprocess.run([python, "-m", "slimexport.cli", "--help"], capture_output=True, cwd=tmp_path)
    assert console.returncode == 0
