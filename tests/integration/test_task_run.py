"""A run that is asked a task: graph, dense graph and checkpoint, in the report and under gates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import tiny_directory, tiny_text

import slimexport
from slimexport import pipeline
from slimexport.config import make_config
from slimexport.errors import BadInputError, UsageError
from slimexport.tasks import score

pytest.importorskip("lm_eval")


def test_tasks_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = tmp_path / "questions.jsonl"
    asked: list[dict[str, Any]] = [
        {"id": str(n), "question": f"What is {n}?", "answerKey": "AB"[n % 2],
         "choices": {"text": ["a number", "nothing"], "label": ["A", "B"]}}
        for n in range(24)
    ]  # fmt: skip
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked))
    texts = [str(tiny_text(tmp_path / f"{name}.txt", 6000, seed=seed)) for seed, name in enumerate(("one", "two"))]
    out = tmp_path / "out"
    options = {
        "model": str(tiny_directory(tmp_path / "model")), "calibration": texts[0], "eval_text": texts[1],
        "calibration_tokens": 1024, "sequence_length": 64, "eval_tokens": 512, "eval_window": 64, "latency_runs": 0,
        "ratio": 0.3, "fast": True, "round_to": 8, "tasks": f"arc_easy={questions}", "task_limit": 20,
        "gates": ["task.arc_easy.torch_agreement>=99.5%", "task.arc_easy.acc>=0"],
    }  # fmt: skip
    report = slimexport.run(make_config(options), out)
    assert report.passed
    accuracy = report.verification.figure("task.arc_easy.acc")
    assert accuracy is not None
    assert accuracy.baseline is not None
    assert "20 questions, difference" in str(accuracy.note)
    kept = report.verification.tasks["arc_easy"]["questions"]
    assert {name: len(of["acc"]) for name, of in kept.items()} == {"shrunk": 20, "baseline": 20, "checkpoint": 20}
    assert kept["shrunk"] != kept["baseline"] or report.verification.tasks["arc_easy"]["metrics"]["shrunk"]
    assert "task.arc_easy.acc" in (out / "report" / "report.md").read_text()

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import task_agreement

    rows = task_agreement.rows_of(out, "arc_easy")
    assert [(row["graph"], row["questions"], row["agreement"]) for row in rows] == [("onnx", 20, 1.0)]
    assert "| arc_easy | 20 | 30% | onnx | " in task_agreement.render(rows)

    def asked_again(*_: Any, **__: Any) -> Any:
        raise AssertionError("what was answered is not asked again")

    monkeypatch.setattr(score, "ask", asked_again)
    again = pipeline.verify(out)
    assert again.figure("task.arc_easy.acc") == accuracy
    with pytest.raises(AssertionError, match="not asked again"):
        pipeline.verify(out, {"task_limit": 4})

    def unchanged() -> None:
        """What cannot be measured costs nothing that was."""
        assert pipeline.report(out).verification.figure("task.arc_easy.acc") == accuracy

    unchanged()
    for wrong in ({"tasks": ["arc_eazy"]}, {"eval_window": 10_000, "eval_tokens": 400}, {"threads": 999}):
        with pytest.raises(BadInputError):
            pipeline.verify(out, wrong)
        unchanged()
    assert slimexport.run(make_config(options), out, resume=True).verification.figure("task.arc_easy.acc") == accuracy
    questions.write_text("".join(json.dumps(row | {"question": "Is it?"}) + "\n" for row in asked))
    with pytest.raises(AssertionError, match="not asked again"):  # other questions in the same file are
        slimexport.run(make_config(options), out, resume=True)


def test_gates_on_tasks_that_are_not_asked() -> None:
    with pytest.raises(BadInputError, match=r"no figure 'task\.arc_easy\.acc': tasks are none"):
        make_config({"model": "m", "gates": "task.arc_easy.acc>=0.4"})
    with pytest.raises(UsageError, match="tasks are hellaswag"):
        make_config({"model": "m", "gates": "task.arc_easy.acc>=0.4", "tasks": "hellaswag"}, flags=("gates",))
    with pytest.raises(BadInputError, match="named twice"):
        make_config({"model": "m", "tasks": ["arc_easy", "arc_easy=x.jsonl"]})
