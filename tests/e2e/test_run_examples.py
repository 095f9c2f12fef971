"""Every example is run: the recipes, the Python script and the pipeline's steps, on a tiny model."""

from __future__ import annotations

import os
import re
import shutil
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
    return tiny_model.material(tmp_path_factory.mktemp("material"))


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


def steps(name: str) -> list[str]:
    """The commands of a pipeline, in order."""
    data = yaml.safe_load((ROOT / "examples" / name).read_text())
    if name == "gitlab-ci.yml":
        return [*data["shrink"]["before_script"], *data["shrink"]["script"]]
    return [step.get("run", "") for step in data["jobs"]["shrink"]["steps"]]


@pytest.mark.parametrize("name", ["github-actions.yml", "gitlab-ci.yml"])
def test_pipeline_steps(name: str, material: dict[str, str], tmp_path: Path) -> None:
    """The steps that are commands of ours, in order, as a runner would run them."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    summary = tmp_path / "summary.md"
    for command in steps(name):
        if "pip install" in command or not command:
            continue
        command = re.sub(r"run smollm2-135m(.*)", rf"run {material['model']}\1 {' '.join(quick(material))}", command)
        run(["bash", "-e", "-c", command], tmp_path, GITHUB_STEP_SUMMARY=str(summary))
    assert summary.read_text().startswith(("# PASSED", "# FAILED"))
    assert (tmp_path / "out" / "report" / "junit.xml").is_file()


def test_serving(material: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    words = ["slimexport", "run", material["model"], "--target", "genai", "-o", "out", *quick(material)]
    run(words, tmp_path)
    script = str(ROOT / "examples" / "serve.py")
    said = run([sys.executable, script, str(tmp_path / "out" / "genai"), "Which word is next?"], tmp_path).stdout
    assert said.strip()
    assert (
        run([sys.executable, script, str(tmp_path / "out" / "genai"), "Which word is next?"], tmp_path).stdout == said
    )


def test_a_criterion_in_a_package_of_its_own(material: dict[str, str], tmp_path: Path) -> None:
    """Built, installed beside slimexport, found by its entry point, and used."""
    package = tmp_path / "package"
    shutil.copytree(ROOT / "examples" / "criterion_package", package)
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet", "--target",
               str(tmp_path / "site"), str(package)]  # fmt: skip
    subprocess.run(install, check=True, capture_output=True)
    words = ["slimexport", "run", material["model"], "--criterion", "activation_norm", "-o", "out", *quick(material)]
    run(words, tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert load_report(tmp_path / "out" / "report").plan.criterion == "activation_norm"
    alone = ["other" if word == "out" else word for word in words]  # without the package
    done = subprocess.run(alone, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PATH": f"{BIN}"})
    assert done.returncode == 4
    assert "Unknown criterion 'activation_norm'" in done.stderr
