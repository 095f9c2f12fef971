"""The model card: what the Hub reads of it, and the licence taken over."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import pytest
import report_data
from huggingface_hub import ModelCard

from slimexport.artifacts import Figure, ModelSource, VerificationReport
from slimexport.checkpoint.card import license_of, model_card

MADE = report_data.report()
EVIL = "a: model\n# with <markup> and 'quotes'"


def card(source: ModelSource = MADE.source, report: VerificationReport | None = MADE.verification) -> ModelCard:
    assert MADE.calibration is not None
    return ModelCard(model_card(source, MADE.plan, MADE.calibration, report, MADE.evaluation))


def test_metadata_and_results() -> None:
    tasks = {"arc_easy": {"metrics": {"shrunk": {"acc": 0.4561}}}}
    figures = (*MADE.verification.figures, Figure("task.arc_easy.acc", "score", 0.4561, 0.523, better="higher"))
    report = dataclasses.replace(MADE.verification, figures=figures, tasks=tasks)
    made = card(dataclasses.replace(MADE.source, name="org/model", kind="hub", license="apache-2.0"), report)
    data = made.data.to_dict()
    assert (data["base_model"], data["license"], data["tags"][0]) == ("org/model", "apache-2.0", "slimexport")
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in made.data.eval_results}
    assert found["English Wikipedia excerpt, evaluation part", "perplexity"] == 30.1
    assert found["arc_easy", "acc"] == 0.4561
    assert "| token perplexity | 23.37 | 30.1 |" in made.text
    assert "| arc_easy.acc | 0.523 | 0.4561 |" in made.text
    assert "(apache-2.0) applies" in made.text


def test_before_anything_was_measured() -> None:
    made = card(report=None)
    assert "model-index" not in made.data.to_dict()
    assert "license" not in made.data.to_dict()
    assert "perplexity" not in made.text


def test_a_name_cannot_break_the_metadata() -> None:
    made = card(dataclasses.replace(MADE.source, name=EVIL, kind="hub", license=EVIL))
    assert (made.data.to_dict()["base_model"], made.data.to_dict()["license"]) == (EVIL, EVIL)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\n---\n# Model\n", "mit"),
        ("---\nlicense: [mit, x]\n---\n", None),
        ("---\n: : :\n---\n", None),
        ("# no metadata\n", None),
        ("---\nlicense: mit\n", None),
    ],
)
def test_the_licence_of_a_directory(tmp_path: Path, text: str, found: str | None) -> None:
    (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) == found


def test_no_card_and_a_gguf_file(tmp_path: Path) -> None:
    assert license_of(tmp_path) is None
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert license_of(tmp_path / "m.gguf") == "apache-2.0"
