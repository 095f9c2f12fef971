"""`slimexport recover` and `run --recover`: between shrink and export, in the same shape, resumable, in the report."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from models import tiny_text

import slimexport
from slimexport import pipeline
from slimexport.artifacts import ChatCheck, Recovery, from_dict, read_json, sha256_tree
from slimexport.checkpoint import load
from slimexport.cli import main
from slimexport.config import RunConfig
from slimexport.errors import BadInputError, SlimExportError
from slimexport.recovery import chat, training
from slimexport.reporting import load_report
from slimexport.reporting.published import published
from slimexport.testing.models import tiny_config, tiny_model, tiny_tokenizer
from slimexport.texts import sources

TRAINING = {"recover": "distill", "recover_budget": "12 steps", "recover_learning_rate": 2e-3, "recover_length": 32,
            "recover_sequences": 4, "recover_text_share": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("recover") / "model"
    torch.manual_seed(0)
    tiny_model(tiny_config("llama")).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    tiny_text(place.parent / "text.txt", 6000, seed=1)
    tiny_text(place.parent / "eval.txt", 2000, seed=5)
    return place


def options(model: Path, **more: Any) -> RunConfig:
    text, other = model.parent / "text.txt", model.parent / "eval.txt"
    given = {"calibration_tokens": 512, "sequence_length": 64, "eval_tokens": 250, "eval_window": 64, "fast": True,
             "latency_runs": 0, "ratio": 0.4, "round_to": 8, "recover_text": str(text)}  # fmt: skip
    return RunConfig(model=str(model), calibration=str(text), eval_text=str(other), **{**given, **more})


def prune(model: Path, out: Path) -> None:
    """`out` as `slimexport prune` leaves it: pruned once, then copied."""
    once = model.parent / "pruned"
    if not once.is_dir():
        pipeline.prune(options(model), once)
    shutil.copytree(once, out, dirs_exist_ok=True)


def recovered(place: Path) -> Recovery:
    return from_dict(Recovery, read_json(place / "recover.json"), "recover.json")


@pytest.fixture(scope="module")
def whole(model: Path) -> Path:
    place = model.parent / "whole"
    slimexport.run(options(model, **TRAINING), place)
    return place


def test_a_run_exports_what_was_trained(whole: Path, model: Path) -> None:
    made = recovered(whole)
    assert made.checkpoint is not None
    assert made.kept.divergence < made.points[0].divergence
    pruned, trained = load(whole / "checkpoint")[0], load(whole / "recovered")[0]
    shapes = {name: tuple(p.shape) for name, p in pruned.state_dict().items()}
    assert {name: tuple(p.shape) for name, p in trained.state_dict().items()} == shapes
    ids = torch.arange(20)[None]
    loaded = load(whole)[0](ids).logits
    assert torch.equal(loaded, trained(ids).logits)
    assert not torch.equal(loaded, pruned(ids).logits)
    report = load_report(whole / "report")
    assert report.recovery == made
    assert report.checkpoint.path == "recovered"
    assert "recover" in report.seconds


def test_the_report_and_the_card_say_how_it_was_trained(whole: Path) -> None:
    import jsonschema

    jsonschema.validate(json.loads((whole / "report" / "report.json").read_text()), published())
    text = (whole / "report" / "report.md").read_text()
    assert "How it was trained" in text
    assert "| recovery |" in text
    page = (whole / "report" / "report.html").read_text()
    assert "KL divergence to dense on held-out text over" in page
    assert "Then trained toward the base model's output: distill," in (whole / "recovered" / "README.md").read_text()
    assert "No training after pruning" in (whole / "checkpoint" / "README.md").read_text()


def test_stages_one_by_one_come_to_the_same_bytes(whole: Path, model: Path, tmp_path: Path) -> None:
    pipeline.prune(options(model), tmp_path / "out")
    assert load(tmp_path / "out")[0]
    made = pipeline.recover(tmp_path / "out", TRAINING)
    assert made.checkpoint is not None
    files, expected = (sha256_tree(place / "recovered") for place in (tmp_path / "out", whole))
    assert {**files, "README.md": ""} == {**expected, "README.md": ""}
    exported = pipeline.export(tmp_path / "out")
    assert exported["onnx"].files["model.onnx"]
    assert sha256_tree(tmp_path / "out" / "onnx") == sha256_tree(whole / "onnx")


def test_adapters_are_merged_into_the_same_shape(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(model, out)
    made = pipeline.recover(out, {**TRAINING, "recover": "lora", "recover_rank": 4})
    assert made.checkpoint is not None
    pruned, trained = load(out / "checkpoint")[0].state_dict(), load(out / "recovered")[0].state_dict()
    assert {name: t.shape for name, t in trained.items()} == {name: t.shape for name, t in pruned.items()}
    changed = {name for name, tensor in trained.items() if not torch.equal(tensor, pruned[name])}
    assert changed
    assert all(name.endswith("proj.weight") for name in changed)


def test_a_package_that_training_needs_is_asked_for_before_pruning(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec

    def find(name: str, *more: Any) -> Any:
        return None if name in ("peft", "bitsandbytes") else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    for changes, package in (({"recover": "lora"}, "peft"), ({"recover_optimizer": "adamw-8bit"}, "bitsandbytes")):
        with pytest.raises(BadInputError, match=f"needs {package}"):
            slimexport.run(options(model, **{**TRAINING, **changes}), tmp_path / "out")
        assert not (tmp_path / "out" / "plan.json").exists()


def test_blocks_that_are_trained_one_by_one(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(model, out)
    made = pipeline.recover(out, {**TRAINING, "recover": "local", "recover_budget": "60 steps"})
    assert made.checkpoint is not None
    assert made.kept.divergence < made.points[0].divergence
    assert made.steps == 60
    assert load(out / "recovered")[0]
    assert "Then trained toward the base model's output: local" in (out / "recovered" / "README.md").read_text()


def test_what_was_exported_before_is_exported_anew(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    slimexport.run(options(model), out)
    before = sha256_tree(out / "onnx")
    pipeline.recover(out, TRAINING)
    with pytest.raises(BadInputError, match="not exported yet"):
        pipeline.verify(out)
    pipeline.export(out)
    assert sha256_tree(out / "onnx") != before
    with pytest.raises(BadInputError, match="recovered already"):
        pipeline.recover(out, TRAINING)
    assert pipeline.recover(out, TRAINING, resume=True) == recovered(out)
    with pytest.raises(BadInputError, match="name --recover distill as well"):
        slimexport.run(options(model), out, resume=True)
    again = pipeline.recover(out, {**TRAINING, "recover_budget": "6 steps"}, force=True)
    assert 0 < again.steps <= 6


def test_a_killed_recovery_is_gone_on_with_to_the_same_bytes(
    whole: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prune(model, out)
    steps = 0
    original = training.Training._step

    def step(self: Any, batch: torch.Tensor) -> float | None:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(training.Training, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        pipeline.recover(out, TRAINING)
    assert not (out / "recovered").exists()
    with pytest.raises(BadInputError, match="--resume goes on with it, --force starts over"):
        pipeline.recover(out, TRAINING)
    with pytest.raises(BadInputError, match="recover_sequences"):
        pipeline.recover(out, {**TRAINING, "recover_sequences": 2}, resume=True)
    pipeline.recover(out, TRAINING, resume=True)
    files, expected = (sha256_tree(place / "recovered") for place in (out, whole))
    assert files["model.safetensors"] == expected["model.safetensors"]
    assert not (out / ".work").exists()


def test_training_that_makes_it_worse_keeps_the_pruned_model(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(model, out)
    made = pipeline.recover(out, {**TRAINING, "recover": "none", "recover_learning_rate": 1e6})
    assert made.method == "distill"  # the one that need not be named
    assert made.checkpoint is None
    assert made.best == 0
    assert not (out / "recovered").exists()
    exported = pipeline.export(out)
    assert exported["onnx"].files


def test_a_gate_that_fails_leaves_both_models(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = slimexport.run(options(model, **TRAINING, gates=("accuracy.kl<=1e-6",)), out)
    assert not report.passed
    assert load(out / "checkpoint")[0]
    assert load(out / "recovered")[0]
    assert CliRunner().invoke(main, ["report", str(out)]).exit_code == 3


def test_text_that_is_evaluated_on_is_refused_unless_forced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prune(model, out)
    both = tmp_path / "both.txt"
    both.write_text((model.parent / "text.txt").read_text() + "\n" + (model.parent / "eval.txt").read_text() * 4)
    with pytest.raises(BadInputError, match="also occur in the recovery text"):
        pipeline.recover(out, {**TRAINING, "recover_text": str(both)})
    assert not (out / "recover.json").exists()
    once = {**TRAINING, "recover_text": str(both), "recover_budget": "1 steps"}
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipeline.recover(out, once, force=True)
    assert pipeline.recover(out, once, resume=True).steps == 1  # it was taken before


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_text_that_will_not_do_is_said_before_pruning(model: Path, tmp_path: Path) -> None:
    short = tiny_text(tmp_path / "short.txt", 40, seed=3)
    for text, said in ((tmp_path / "none.txt", "does not exist"), (short, "too short to recover on"),
                       (model.parent / "eval.txt", "also occur in the recovery text")):  # fmt: skip
        with pytest.raises(BadInputError, match=said):
            slimexport.run(options(model, **{**TRAINING, "recover_text": str(text)}), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(BadInputError, match="--recover-length"):
        slimexport.run(options(model, **{**TRAINING, "recover_length": 1 << 20}), tmp_path / "out")


def test_a_text_that_changes_is_seen_by_a_run_that_goes_on(model: Path, tmp_path: Path) -> None:
    text, out = tiny_text(tmp_path / "text.txt", 4000, seed=21), tmp_path / "out"
    given = options(model, **{**TRAINING, "recover_text": str(text), "recover_budget": "2 steps"})
    given = given.model_copy(update={"calibration": str(text)})
    pipeline.prune(given, out)
    pipeline.recover(out, {"recover": "distill"})
    before, changed = text.read_text(), tiny_text(tmp_path / "other.txt", 4000, seed=22).read_text()
    text.write_text(changed)
    with pytest.raises(BadInputError, match=r"text.txt has changed since the model was trained on it: .* --force"):
        pipeline.recover(out, resume=True)
    with pytest.raises(BadInputError, match=r"text.txt has changed since .*out was made from it: --force starts over"):
        pipeline.prune(given, out, resume=True)
    text.unlink()
    pipeline.prune(given, out, resume=True)
    text.write_text(before)
    assert pipeline.recover(out, resume=True) == recovered(out)


def test_text_that_was_trained_on_is_not_evaluated_on_later(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(model, out)
    other = tiny_text(tmp_path / "other.txt", 4000, seed=9)
    made = pipeline.recover(out, {**TRAINING, "recover_text": str(other), "recover_text_share": 0.5})
    assert made.checkpoint is not None
    pipeline.export(out)
    with pytest.raises(BadInputError, match="also occur in the recovery text"):
        pipeline.verify(out, {"eval_text": str(other)})
    pipeline.verify(out, {"eval_text": str(tiny_text(tmp_path / "new.txt", 2000, seed=11))})
    other.write_text(other.read_text() + "\n\nAnd so on.")
    with pytest.raises(BadInputError, match="has changed since the model was trained on it"):
        pipeline.verify(out, {"eval_text": str(tiny_text(tmp_path / "newer.txt", 2000, seed=12))})


def test_what_the_model_wrote_is_not_written_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    original = sources.write

    def write(*arguments: Any) -> Any:
        nonlocal written
        written += 1
        return original(*arguments)

    monkeypatch.setattr(sources, "write", write)
    out, text = tmp_path / "out", {**TRAINING, "recover_text": f"mix:{model.parent / 'text.txt'}=0.5,chat=0.5"}
    prune(model, out)
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipeline.recover(out, text)
    made = pipeline.recover(out, text, resume=True)
    assert written == 1
    assert [part.name for part in made.texts if part.written] == ["chat"]


@pytest.mark.parametrize("method", ["distill", "lora", "local"])
def test_a_model_in_bfloat16_comes_out_in_bfloat16(
    model: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward passes in it as well: rotary frequencies stay in float32, in teacher and student."""
    place = tmp_path / "model"
    tiny_model(tiny_config("llama")).bfloat16().save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    monkeypatch.setattr("slimexport.machine.precision.fast_bfloat16", lambda device: torch.bfloat16)
    teachers: list[Any] = []
    original = training.Training.run

    def run(self: Any, state: Any) -> Any:
        teachers.append(self.teacher)
        return original(self, state)

    monkeypatch.setattr(training.Training, "run", run)
    out, given = tmp_path / "out", options(model).model_copy(update={"model": str(place)})
    pipeline.prune(given, out)
    made = pipeline.recover(out, {**TRAINING, "recover": method, "recover_budget": "24 steps"})
    assert made.checkpoint is not None
    (teacher,) = teachers
    assert teacher.dtype == torch.bfloat16
    assert teacher.model.rotary_emb.inv_freq.dtype == torch.float32
    assert load(out / "recovered")[0].dtype == torch.bfloat16


def test_a_model_that_rounding_makes_no_better_is_not_taken(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.Training, "judged", lambda self, finished: 1e9)
    monkeypatch.setattr(chat.Chat, "check", lambda self, before, after: ChatCheck(4, 64, 3, 0))
    out = tmp_path / "out"
    prune(model, out)
    made = pipeline.recover(out, {**TRAINING, "recover": "lora"})
    assert made.checkpoint is None
    assert made.best == 0
    assert made.chat == ChatCheck(4, 64, 3, 3)  # of the model that is kept
    assert not any("answers in its chat template" in note for note in made.notes)
    assert not (out / "recovered").exists()


def test_a_device_without_room_for_both_models_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(chat.Chat, "__init__", full)
    prune(model, tmp_path)
    with pytest.raises(BadInputError, match=r"ran out of memory with both models .*needs less"):
        pipeline.recover(tmp_path, TRAINING)


def test_what_a_kill_left_of_a_finished_training_is_in_nobodys_way(model: Path, tmp_path: Path) -> None:
    prune(model, tmp_path)
    made = pipeline.recover(tmp_path, TRAINING)
    left = tmp_path / ".work" / "recovery" / "state.json"
    left.parent.mkdir(parents=True)
    left.write_text("{}")
    assert pipeline.recover(tmp_path, TRAINING, resume=True) == made
    assert not (tmp_path / ".work").exists()
    left.parent.mkdir(parents=True)
    left.write_text("{}")
    assert pipeline.recover(tmp_path, {**TRAINING, "recover_budget": "3 steps"}, resume=True).steps == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recover_length": 100_000}, "more than the model's context of"),
        ({"recover_sequences": 10_000}, "too short to recover on"),
        ({"recover_budget": "10 tokens"}, "shorter than one step"),
        ({"recover_budget": "soon"}, "is no budget"),
        ({"recover_text": "/nowhere.txt"}, "nowhere"),
        ({"recover": "distil"}, "Did you mean 'distill'"),
        ({"recover": "local", "recover_budget": "2 steps"}, "one step for each of 3 blocks"),
        ({"max_memory": "0.6GB"}, "Training needs .* GB of memory, with one sequence .*--max-memory 0.60 GB"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    model: Path, whole: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    prune(model, out)
    with pytest.raises(SlimExportError, match=message):
        pipeline.recover(out, {**TRAINING, **changes})
    assert load(out)[0]


def test_a_model_that_changed_is_no_teacher(model: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "model"
    shutil.copytree(model, other)
    for name in ("text.txt", "eval.txt"):
        shutil.copy(model.parent / name, tmp_path / name)
    pipeline.prune(options(other), tmp_path / "out")
    tiny_model(tiny_config("llama"), seed=7).save_pretrained(other)
    for force in (False, True):
        with pytest.raises(BadInputError, match=r"has changed since it was pruned.*run or prune, with --force"):
            pipeline.recover(tmp_path / "out", TRAINING, force=force)


def test_without_pruning_there_is_nothing_to_recover(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no run directory"):
        pipeline.recover(tmp_path / "nothing")
