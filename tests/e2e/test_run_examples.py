"""Every example is run: the recipes, the Python script and the pipeline's steps, on a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_model
import yaml

from slimexport.reporting import load_report

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("material")
    calibration, evaluation = tiny_model.write_texts(directory)
    model = tiny_model.write_model(directory, calibration)
    return {"model": str(model), "calibration": str(calibration), "evaluation": str(evaluation)}


def run(words: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env={**os.environ, **path, **environment})
    # A random model passes no gate on quality; any other failure is one.
    assert done.returncode in (0, 3), done.stderr
    return done


def quick(material: dict[str, str]) -> list[str]:
    return [
        *tiny_model.QUICK, "--calibration", material["calibration"], "--eval-text", material["evaluation"],
        "--device=cpu", "--dtype=float32", "--provider=cpu", "--seed=0",
    ]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe(recipe: Path, material: dict[str, str], tmp_path: Path) -> None:
    words = ["slimexport", "run", material["model"], "--recipe", str(recipe), "-o", "out", *quick(material)]
    done = run(words, tmp_path)
    report = load_report(tmp_path / "out" / "report")
    assert report.passed == (done.returncode == 0)
    assert report.config["ratio"] == yaml.safe_load(recipe.read_text())["ratio"]
    assert (tmp_path / "out" / "onnx" / "model.onnx").is_file()


def test_python_api(material: dict[str, str], tmp_path: Path) -> None:
    settings = [word.lstrip("-").replace("-", "_") for word in tiny_model.QUICK]
    settings += [f"calibration={material['calibration']}", f"eval_text={material['evaluation']}"]
    script = ROOT / "examples" / "python_api.py"
    words = [sys.executable, str(script), material["model"], "out", *settings]
    done = run(words, tmp_path)
    assert "parameters, ratio 0.2" in done.stdout
    assert load_report(tmp_path / "out" / "report").verdict in done.stdout


def test_pipeline_steps(material: dict[str, str], tmp_path: Path) -> None:
    """The steps that are commands of ours, in order, as a runner would run them."""
    steps = yaml.safe_load((ROOT / "examples" / "github-actions.yml").read_text())["jobs"]["shrink"]["steps"]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    summary = tmp_path / "summary.md"
    for step in steps:
        command = step.get("run", "")
        if "pip install" in command or not command:
            continue
        command = re.sub(r"run smollm2-135m(.*)", rf"run {material['model']}\1 {' '.join(quick(material))}", command)
        run(["bash", "-e", "-c", command], tmp_path, GITHUB_STEP_SUMMARY=str(summary))
    assert summary.read_text().startswith(("# PASSED", "# FAILED"))
    assert (tmp_path / "out" / "report" / "junit.xml").is_file()
