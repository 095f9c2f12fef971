"""One pruning, several precisions: every export beside its baseline, in the report, and held to the gates."""

from __future__ import annotations

from typing import Any

import pytest
from models import tiny_directory, tiny_text

import slimexport
from slimexport import pipeline
from slimexport.errors import BadInputError
from slimexport.gates import figures
from slimexport.reporting import load_report
from slimexport.runtime import OnnxDecoder

PRECISIONS = ("int8", "fp32", "int4-mixed")
NAMES = ("onnx-int8", "onnx", "onnx-int4-mixed")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("inputs")
    model = tiny_directory(place / "model")
    texts = [tiny_text(place / f"{name}.txt", 9000, seed=seed) for seed, name in enumerate(("calibration", "eval"))]
    return {
        "model": str(model), "calibration": str(texts[0]), "eval_text": str(texts[1]), "calibration_tokens": 2048,
        "sequence_length": 64, "eval_tokens": 512, "eval_window": 64, "latency_runs": 0, "ratio": 0.3, "fast": True,
        "round_to": 8, "max_kl": 0.5, "precision": PRECISIONS,
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("run") / "out"
    return out, pipeline.run(slimexport.RunConfig(**options), out)


def test_every_precision_is_there_with_its_baseline(finished: Any) -> None:
    out, report = finished
    assert tuple(report.exports) == (*NAMES, *(f"baseline/{name}" for name in NAMES))
    sizes = {name: (out / name / "model.onnx.data").stat().st_size for name in report.exports}
    assert sizes["onnx-int4-mixed"] < sizes["onnx-int8"] < 0.6 * sizes["onnx"]
    for name, precision in zip(NAMES, PRECISIONS, strict=True):
        assert sizes[name] < sizes[f"baseline/{name}"]
        assert report.exports[name].precision == precision
        assert OnnxDecoder(out / name, threads=1).artifact.files == report.exports[name].files
    hidden = [path for path in out.rglob("*") if path.name.startswith(".") and path.is_dir()]
    assert not hidden, "what the checks needed is gone"


def test_force_leaves_no_export_of_another_pruning(finished: Any, options: dict[str, Any], tmp_path: Any) -> None:
    import shutil

    out = shutil.copytree(finished[0], tmp_path / "out")
    with pytest.raises(BadInputError, match="threads must be from 1"):
        pipeline.run(slimexport.RunConfig(**options, threads=999), out, force=True)
    assert (out / "onnx-int8").is_dir(), "bad input loses nothing"
    pipeline.prune(slimexport.RunConfig(**options | {"ratio": 0.2, "precision": "fp32"}), out, force=True)
    assert not list(out.glob("onnx*"))
    assert (out / "baseline" / "onnx-int8").is_dir(), "the dense model is the same"
    with pytest.raises(BadInputError, match="is not verified yet"):
        pipeline.verified(out)


def test_accuracy_of_all_is_held_to_the_dense_model_in_full_precision(finished: Any) -> None:
    _, report = finished
    assert tuple(report.others) == NAMES[1:]
    each = {NAMES[0]: report.verification, **report.others}
    dense = {name: made.figure("accuracy.perplexity").baseline for name, made in each.items()}
    assert len(set(dense.values())) == 1
    own = {name: made.figure("accuracy.perplexity").shrunk for name, made in each.items()}
    assert len(set(own.values())) == len(NAMES), "each was measured on its own graph"
    kl = {name: made.figure("accuracy.kl").shrunk for name, made in each.items()}
    assert kl["onnx-int8"] == pytest.approx(kl["onnx"], rel=0.2)
    before = report.verification.numerics["shrunk"]["before"]
    assert [of["precision"] for of in before] == ["fp32", "fp32"]
    assert all(of["failure"] is None for of in before)


def test_the_report_shows_all_and_can_be_read_again(finished: Any) -> None:
    out, report = finished
    again = load_report(out / "report")
    assert [of.figures for of in again.others.values()] == [of.figures for of in report.others.values()]
    assert {r.export for r in report.gates} == {"", *NAMES[1:]}
    text = (out / "report" / "report.md").read_text()
    assert "## Every export" in text
    for name in NAMES:
        assert f"| {name} |" in text
        assert name in (out / "report" / "report.html").read_text()
    assert "onnx-int4-mixed: accuracy.kl&lt;=0.5" in (out / "report" / "junit.xml").read_text()
    assert "--precision int8,fp32,int4-mixed" in text


def test_gates_may_name_every_figure(finished: Any) -> None:
    _, report = finished
    known = figures.known(report.config["prompt_lengths"])
    for made in (report.verification, *report.others.values()):
        assert {figure.name: figure.unit for figure in made.figures}.items() <= known.items()


def test_one_precision_that_misses_a_gate_fails_the_run(finished: Any) -> None:
    out, report = finished
    kl = sorted(made.figure("accuracy.kl").shrunk for made in (report.verification, *report.others.values()))
    bound = (kl[-1] + kl[-2]) / 2
    worst = max(report.others, key=lambda name: report.others[name].figure("accuracy.kl").shrunk)
    again = pipeline.report(out, {"max_kl": bound})
    assert not again.passed
    lost = [result for result in again.gates if not result.passed]
    assert [result.export for result in lost] == [worst]
    assert lost[0].message.startswith(f"{worst}: accuracy.kl")
    assert again.verdict.startswith("FAILED: 1 of 3 gates")


def test_weights_of_4_bits_are_rounded_by_the_calibration_text(finished: Any) -> None:
    """The dense model's too, whose graph is made anew for another text."""
    out, _ = finished
    files = {}
    for tokens in (0, 1024, 2048, 2048):
        pipeline.export(out, {"precision": ("int4",), "rounding_tokens": tokens}, force=True)
        both = (out / place / "model.onnx.data" for place in ("onnx-int4", "baseline/onnx-int4"))
        found = tuple(path.read_bytes() for path in both)
        assert files.setdefault(tokens, found) == found, "the same again"
    for place in (0, 1):
        assert len({found[place] for found in files.values()}) == 3
        assert len({len(found[place]) for found in files.values()}) == 1


def test_a_precision_added_later_prunes_nothing_again(finished: Any) -> None:
    out, _ = finished
    before = (out / "prune.json").read_bytes()
    pipeline.export(out, {"precision": ("int4",)}, force=True)
    pipeline.verify(out)
    report = pipeline.report(out)
    assert tuple(report.exports) == ("onnx-int4", "baseline/onnx-int4", "baseline/onnx")
    full = finished[1].others["onnx"].figure("accuracy.perplexity").baseline
    assert report.verification.figure("accuracy.perplexity").baseline == pytest.approx(full), (
        "what rounding costs is seen"
    )
    assert (out / "prune.json").read_bytes() == before
