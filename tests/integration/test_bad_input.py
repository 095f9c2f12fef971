"""Bad input through the real command line: one line, the documented exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_directory, tiny_model, tiny_text, tiny_tokenizer
from safetensors.torch import load_file, save_file

from slimexport.artifacts import sha256_tree
from slimexport.cli import main
from slimexport.run_directory import LOCK, RunDirectory

Result = tuple[int, str, str]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("model") / "good")


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return tiny_text(tmp_path / "text.txt", 3000, seed=1)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], text: Path, tmp_path: Path) -> Callable[..., Result]:
    evaluation = tiny_text(tmp_path / "eval.txt", 2000, seed=5)

    def call(command: str, *args: Any, **flags: Any) -> Result:
        flags = {"calibration": text, "eval_text": evaluation, "calibration_tokens": 512, "sequence_length": 64,
                 "eval_tokens": 256, "eval_window": 64} | flags  # fmt: skip
        if command not in ("run", "verify"):
            flags = {k: v for k, v in flags.items() if not k.startswith("eval")}
        words = [str(a) for a in args] + [w for k, v in flags.items() for w in (f"--{k.replace('_', '-')}", str(v))]
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([command, *words])
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def refused(result: Result, *expected: str, code: int = 4) -> None:
    """Exit code, and one line that says all of `expected`, and no traceback."""
    got, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert got == code, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for part in expected:
        assert part in lines[0], lines[0]


@pytest.fixture
def prune(cli: Callable[..., Result], tmp_path: Path) -> Iterator[Callable[..., Result]]:
    """`slimexport prune` into a directory that must not exist afterwards."""
    out = tmp_path / "out"

    def call(source: Any, **flags: Any) -> Result:
        return cli("prune", source, "-o", out, **flags)

    yield call
    assert not out.exists()


# ------------------------------------------------------------------------------------------------------------- models


def test_not_a_model_directory(prune: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(prune(tmp_path / "empty"), "is not a model directory", "config.json")
    refused(prune(tmp_path / "nothing"), "neither a directory, a .gguf file nor a Hub id")
    refused(prune(tmp_path / "nothing.gguf"), "does not exist")
    (tmp_path / "empty" / "m.gguf").touch()
    refused(prune(tmp_path / "empty"), "It holds m.gguf")


def test_hub_id_that_cannot_be_had(prune: Callable[..., Result]) -> None:
    refused(prune("nobody/no-such-model"), "the Hub did not give it")
    refused(prune("smollm2-135"), "Did you mean 'smollm2-135m'")


def test_config_that_is_no_model(prune: Callable[..., Result], model: Path) -> None:
    (model / "config.json").write_text("{")
    refused(prune(model), "config.json is not valid JSON")
    (model / "config.json").write_text("{}")
    refused(prune(model), "has no model_type")


def test_encoder_only_and_unsupported_families(prune: Callable[..., Result], tmp_path: Path) -> None:
    from transformers import BertConfig, BloomConfig

    bert = BertConfig()
    bert.architectures = ["BertModel"]
    bert.save_pretrained(str(tmp_path / "bert"))
    refused(prune(tmp_path / "bert"), "'bert'", "no decoder-only language model", "slimexport architectures")
    BloomConfig().save_pretrained(str(tmp_path / "bloom"))
    refused(prune(tmp_path / "bloom"), "'bloom'", "families that can be pruned")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_packed_weights_are_refused_by_name(prune: Callable[..., Result], model: Path, method: str) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    refused(prune(model), f"is packed ({method})")


def test_missing_safetensors(prune: Callable[..., Result], model: Path) -> None:
    (model / "model.safetensors").unlink()
    refused(prune(model), "model.safetensors is missing")


def test_pickles_are_refused_with_the_way_out(prune: Callable[..., Result], model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(prune(model), "only pickled weights (pytorch_model.bin)", "save_pretrained")


def test_truncated_and_corrupt_safetensors(prune: Callable[..., Result], model: Path) -> None:
    weights = model / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    refused(prune(model), "model.safetensors is truncated or corrupt")
    weights.write_bytes(data[:50])
    refused(prune(model), "truncated or no safetensors file")
    weights.write_bytes(data[:8] + b"\xff" * 40 + data[48:])
    refused(prune(model), "is corrupt")
    weights.write_bytes(b"")
    refused(prune(model), "truncated or no safetensors file")


def test_shard_that_is_missing(prune: Callable[..., Result], model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(names))
    refused(prune(model), "model-00002-of-00002.safetensors is missing")


def test_tensor_that_is_missing_or_of_the_wrong_size(prune: Callable[..., Result], model: Path) -> None:
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, weights, {"format": "pt"})
    refused(prune(model), name)
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, weights, {"format": "pt"})
    refused(prune(model), "cannot be loaded")


def test_weights_with_nan(prune: Callable[..., Result], model: Path) -> None:
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.2.self_attn.v_proj.weight"][3, 4] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    refused(prune(model), "model.layers.2.self_attn.v_proj.weight holds NaN")


def test_tokenizer_missing(prune: Callable[..., Result], model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    refused(prune(model), "tokenizer")


def test_cuda_that_is_absent(prune: Callable[..., Result], model: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    refused(prune(model, device="cuda"), "cuda", "sees 0 CUDA devices")
    refused(prune(model, device="tpu"), "Unknown device 'tpu'")


# -------------------------------------------------------------------------------------------------------------- ratio


def test_ratios_that_make_no_sense(prune: Callable[..., Result], model: Path) -> None:
    refused(prune(model, ratio=1.0), "--ratio", "less than 1", code=2)
    refused(prune(model, ratio=-0.1), "--ratio", "greater than or equal to 0", code=2)
    refused(prune(model, ratio=0.99), "the most that can be removed from this model is 0.")


def test_unknown_names(prune: Callable[..., Result], model: Path) -> None:
    refused(prune(model, criterion="slimgtp"), "Did you mean 'slimgpt'")
    refused(prune(model, allocation="incremantal"), "Did you mean 'incremental'")


def test_provider_that_is_absent_is_said_before_anything_is_done(cli: Callable[..., Result], model: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is one here")
    out = model.parent / "out"
    refused(cli("run", model, "-o", out, provider="cuda"), "CUDAExecutionProvider", "slimexport[gpu]")
    assert not out.exists()


def test_unknown_target_is_said_before_anything_is_done(
    cli: Callable[..., Result], model: Path, tmp_path: Path
) -> None:
    refused(cli("run", model, "-o", tmp_path / "out", target="onx"), "Unknown target 'onx'", "Did you mean 'onnx'")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("ratoi: 0.3", ["unknown key 'ratoi'", "Did you mean 'ratio'"]),
        ("ratio: much", ["ratio", "'much'"]),
        ("ratio: [0.3", ["YAML"]),
        ("- ratio", ["recipe.yaml"]),
        ("ratio: 2", ["ratio"]),
    ],
)
def test_recipes(prune: Callable[..., Result], model: Path, tmp_path: Path, recipe: str, expected: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    refused(prune(model, recipe=path), *expected)


# --------------------------------------------------------------------------------------------------------------- text


def test_calibration_texts(prune: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("")
    refused(prune(model, calibration=path), "empty")
    path.write_bytes(b"\x00\x01\x02" * 100)
    refused(prune(model, calibration=path), "c.txt")
    path.write_text("w1 w2 w3")
    refused(prune(model, calibration=path), "found 3 tokens", "need")
    refused(prune(model, calibration=tmp_path / "none.txt"), "none.txt")


def test_calibration_and_evaluation_that_are_the_same(
    cli: Callable[..., Result], model: Path, text: Path, tmp_path: Path
) -> None:
    refused(cli("run", model, "-o", tmp_path / "out", eval_text=text), "text.txt")
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text.read_bytes())
    refused(cli("run", model, "-o", tmp_path / "out", eval_text=copy))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- output


def test_output_that_is_not_empty(cli: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for flags in ([], ["--force"], ["--resume"]):
        refused(cli("prune", model, "-o", out, *flags), "holds no run of slimexport", "left alone")
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    refused(cli("prune", model, "-o", out / "thesis.txt"), "is a file", code=2)
    assert (out / "thesis.txt").read_text() == "mine"


def test_finished_run_is_replaced_only_with_force_and_only_by_good_input(
    cli: Callable[..., Result], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli("prune", model, "-o", out, ratio=0.3)[0] == 0
    before = (out / "checkpoint" / "model.safetensors").read_bytes()
    refused(cli("prune", model, "-o", out, ratio=0.5), "--force", "--resume")
    refused(cli("prune", tmp_path / "nothing", "-o", out, "--force"), "nothing")
    refused(cli("prune", model, "-o", out, "--resume", ratio=0.5), "ratio = 0.3, not 0.5")
    assert (out / "checkpoint" / "model.safetensors").read_bytes() == before
    assert cli("prune", model, "-o", out, "--resume", ratio=0.3)[0] == 0
    assert cli("prune", model, "-o", out, "--force", ratio=0.5)[0] == 0
    assert len((out / "checkpoint" / "model.safetensors").read_bytes()) < len(before)
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]


def test_resume_of_nothing_simply_starts(cli: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    assert cli("prune", model, "-o", tmp_path / "new", "--resume")[0] == 0
    (tmp_path / "empty").mkdir()
    assert cli("prune", model, "-o", tmp_path / "empty", "--resume")[0] == 0
    assert (tmp_path / "empty" / "checkpoint" / "model.safetensors").is_file()


def test_two_runs_in_one_directory(cli: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with RunDirectory(out).locked():
        refused(cli("prune", model, "-o", out), "in use by another run")
    assert not (out / LOCK).exists()


def test_stages_out_of_order(cli: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(["export", str(tmp_path / "none")])
    assert stop.value.code == 4
    assert cli("prune", model, "-o", out)[0] == 0
    for command in ("verify", "report"):
        with pytest.raises(SystemExit) as stop:
            main([command, str(out)])
        assert stop.value.code == 4


def test_baseline_cache_of_another_run(
    cli: Callable[..., Result], model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from slimexport.run_directory import lock_file
    from slimexport.stages import export as exporting

    monkeypatch.setattr(exporting, "CACHE_WAIT", 0.2)
    monkeypatch.setattr(exporting, "_key", lambda *_: "key")
    cache = tmp_path / "cache"
    cache.mkdir()
    with lock_file(cache / "key.lock", "busy"):
        result = cli("run", model, "-o", tmp_path / "out", baseline_cache=cache, latency_runs=0)
    refused(result, "baseline cache", "locked by another run")
    assert not (tmp_path / "out" / "baseline").exists()
    made = (tmp_path / "out" / "onnx").stat()
    again = cli("run", model, "-o", tmp_path / "out", "--resume", baseline_cache=cache, latency_runs=0)
    assert again[0] == 0, again[2]
    assert (tmp_path / "out" / "onnx").stat().st_ino == made.st_ino  # the shrunk model's graph was finished
    assert (tmp_path / "out" / "baseline" / "onnx" / "model.onnx").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB; root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("room", [40, 150, 400])  # kB: nothing, some blocks, all blocks but no checkpoint
def test_full_disk(cli: Callable[..., Result], model: Path, small_disk: Path, tmp_path: Path, room: int) -> None:
    """And once there is room, the run goes on to the same bytes."""
    subprocess.run(["mount", "-o", f"remount,size={room}k", str(small_disk)], check=True)
    out = small_disk / "out"
    refused(cli("prune", model, "-o", out), "No space left on device")
    assert not (out / "checkpoint").exists()
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    result = cli("prune", model, "-o", out, "--resume")
    assert result[0] == 0, result[2]
    assert cli("prune", model, "-o", tmp_path / "whole")[0] == 0
    assert sha256_tree(out / "checkpoint") == sha256_tree(tmp_path / "whole" / "checkpoint")


def test_read_only_output(cli: Callable[..., Result], model: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused(cli("prune", model, "-o", small_disk / "out"), "Read-only file system")


def test_nothing_is_written_outside_the_output(
    cli: Callable[..., Result], model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    here = tmp_path / "cwd"
    here.mkdir()
    monkeypatch.chdir(here)
    before = {p: p.stat().st_mtime_ns for p in model.rglob("*")}
    assert cli("prune", model, "-o", tmp_path / "out")[0] == 0
    assert os.listdir(here) == []
    assert {p: p.stat().st_mtime_ns for p in model.rglob("*")} == before


def test_ratio_zero_is_the_identity_on_disk(cli: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    assert cli("prune", model, "-o", tmp_path / "out", ratio=0)[0] == 0
    before, after = (load_file(p / "model.safetensors") for p in (model, tmp_path / "out" / "checkpoint"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_models_module_makes_what_it_says() -> None:
    assert tiny_tokenizer().vocab_size == tiny_model().config.vocab_size


# -------------------------------------------------------------------------------- a run directory that others touch


@pytest.fixture
def run_done(cli: Callable[..., Result], model: Path, tmp_path: Path) -> Path:
    """A finished run with a gate that fails."""
    out = tmp_path / "out"
    result = cli("run", model, "-o", out, latency_runs=0, max_kl=0.00001)
    assert result[0] == 3, result[2]
    return out


def bare(*words: Any) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(w) for w in words])
    return int(stop.value.code or 0)


def test_gates_survive_a_resumed_prune_and_inputs_may_not_change(
    cli: Callable[..., Result], run_done: Path, model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    assert cli("prune", model, "-o", run_done, "--resume")[0] == 0
    assert bare("report", run_done, "--max-kl", 100) == 0  # holds for this report
    assert bare("report", run_done) == 3
    monkeypatch.chdir(tmp_path / "model")  # paths of the first run count from where it was started
    assert bare("verify", run_done, "--latency-runs", 0) == 0
    tiny_text(tmp_path / "text.txt", 3000, seed=8)
    assert bare("verify", run_done, "--latency-runs", 0) == 4
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"temperature": 0.5}))
    refused(cli("prune", model, "-o", run_done, "--resume"), "has changed since")


def test_the_report_of_an_earlier_run(
    cli: Callable[..., Result], run_done: Path, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Against a copy of itself everything holds. Itself, what is no report, or another model's is refused before
    anything is done."""
    earlier = tmp_path / "earlier.json"
    shutil.copy(run_done / "report" / "report.json", earlier)
    gates = ["--gate", "earlier(accuracy.perplexity)<=1", "--gate", "earlier(size.export_mb)<=1", "--max-kl", 100]
    assert bare("report", run_done, "--against", earlier, *gates) == 0
    for place in (run_done, run_done / "report"):
        assert bare("report", run_done, "--against", place, *gates) == 4
        assert "whose report is replaced" in capfd.readouterr().err.splitlines()[-1]
    assert bare("report", run_done, *gates) == 3
    assert "no earlier report is given (--against report.json)" in capfd.readouterr().err.splitlines()[-1]
    data = json.loads(earlier.read_text())

    def against(content: str) -> Result:
        earlier.write_text(content)
        return cli("run", model, "-o", tmp_path / "new", against=earlier)

    refused(against(json.dumps(data)[:500]), "is not valid JSON", "truncated")
    refused(against(json.dumps({**data, "schema_version": 99})), "has schema_version 99")
    other = {**data, "source": {**data["source"], "fingerprint": "0" * 64, "name": "another"}}
    refused(against(json.dumps(other)), "is the report of another model: another has the fingerprint 000000000000")
    assert not (tmp_path / "new").exists()
    earlier.write_text(json.dumps({**data, "environment": {**data["environment"], "cpu": "Z80"}}))
    assert bare("report", run_done, "--against", earlier, "--gate", "earlier(load.seconds)<=9", "--max-kl", 100) == 3


def test_a_run_outlives_the_one_that_it_was_compared_with(
    cli: Callable[..., Result], run_done: Path, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "earlier.json"
    shutil.copy(run_done / "report" / "report.json", earlier)
    out, gate = tmp_path / "next", "earlier(size.export_mb)<=1"
    assert cli("run", model, "-o", out, against=earlier, gate=gate, latency_runs=0)[0] == 0
    earlier.unlink()
    assert bare("verify", out) == 0  # gates decide there how often to measure, no more
    assert bare("report", out) == 4
    assert "earlier.json does not exist" in capfd.readouterr().err.splitlines()[-1]
    shutil.copy(run_done / "report" / "report.json", earlier)
    assert bare("report", out) == 0


def test_an_earlier_report_is_not_replaced_by_what_it_is_compared_with(
    cli: Callable[..., Result], run_done: Path, model: Path
) -> None:
    for flag in ("--force", "--resume"):
        for place in (run_done, run_done / "report"):
            refused(cli("run", model, "-o", run_done, flag, against=place), "whose report is replaced")
    assert (run_done / "report" / "report.json").is_file()


def test_reports_of_one_run_twice_and_a_comparison_that_is_there(
    run_done: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_done, tmp_path / "other")
    notes = tmp_path / "notes.md"
    notes.write_text("mine")
    assert bare("report", run_done, f"{run_done}/") == 4
    assert "is named twice" in capfd.readouterr().err
    both = ("report", run_done, tmp_path / "other", "--max-kl", 100, "-o", notes)
    assert bare(*both) == 4
    assert notes.read_text() == "mine"
    assert bare(*both, "--force") == 0
    assert notes.read_text() != "mine"


def test_an_export_that_fails_leaves_no_report_of_the_old_one(run_done: Path, model: Path) -> None:
    shutil.rmtree(run_done / "baseline")
    model.rename(model.parent / "elsewhere")  # the dense model cannot be exported any more
    assert (run_done / "report" / "junit.xml").is_file()
    assert bare("export", run_done, "--force", "--exporter", "mobius") == 4
    assert not (run_done / "report").exists()
    assert bare("report", run_done) == 4


def test_changed_files_are_noticed(run_done: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = run_done / "onnx" / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(bytes(data))
    assert bare("verify", run_done, "--latency-runs", 0) == 4
    said = capfd.readouterr().err
    assert "model.onnx.data is not the file that was written here" in said
    assert f"slimexport export {run_done} --force makes it anew" in said
    with (run_done / "checkpoint" / "config.json").open("a") as file:
        file.write("\n")
    for flag in ("--resume", "--force"):
        assert bare("export", run_done, "--precision", "int8", flag) == 4
        assert "slimexport run or prune, with --force, starts over" in capfd.readouterr().err


def test_force_never_removes_inputs_or_foreign_files(
    cli: Callable[..., Result], run_done: Path, tmp_path: Path
) -> None:
    (run_done / "notes.md").write_text("mine")
    refused(cli("prune", run_done / "checkpoint", "-o", run_done, "--force"), "lies in", "--force would replace")
    assert (run_done / "checkpoint" / "model.safetensors").is_file()
    other = tmp_path / "disk2"
    (run_done / "onnx").rename(other)
    (run_done / "onnx").symlink_to(other)
    assert cli("prune", tmp_path / "model", "-o", run_done, "--force")[0] == 0
    assert (run_done / "notes.md").read_text() == "mine"
    assert (other / "model.onnx").is_file()


@pytest.mark.parametrize("content", ["{", "[]", '{"schema_version": 1}', '{"schema_version": 9, "stages": {}}'])
def test_broken_run_record(cli: Callable[..., Result], model: Path, tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text(content)
    refused(cli("prune", model, "-o", out, "--resume"), "run.json")
    assert bare("report", out) == 4
    assert cli("prune", model, "-o", out, "--force")[0] == 0


def test_what_a_kill_leaves_does_not_stand_in_the_way(
    cli: Callable[..., Result], run_done: Path, model: Path, tmp_path: Path
) -> None:
    """In the very first write, and when nothing but tidying up was left to do."""
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / ".run.json.ab12").write_text("{")
    assert cli("prune", model, "-o", begun)[0] == 0
    work = run_done / ".work"
    (work / "recovery").mkdir(parents=True)
    (work / "000.safetensors").write_bytes(b"x")
    assert cli("prune", model, "-o", run_done, "--resume")[0] == 0
    assert [path.name for path in work.iterdir()] == ["recovery"]  # it may be gone on with


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_model_comes_only_with_trust(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.extend(allow_patterns)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    flags = ["--trust-remote-code"] if trusted else []
    refused(cli("prune", "someone/model", "-o", tmp_path / "out", *flags), "no network")
    assert ("*.py" in asked) is trusted


def test_links_to_nowhere_and_directories_that_a_failure_leaves(cli: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    refused(cli("prune", tmp_path / "none", "-o", tmp_path / "link"), "link to nowhere")
    refused(cli("prune", tmp_path / "none", "-o", tmp_path / "a" / "b" / "c"), "none")
    assert not (tmp_path / "a").exists()


def test_stored_precision_is_that_of_the_tensors(cli: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert cli("prune", model, "-o", tmp_path / "out", ratio=0)[0] == 0
    before, after = (load_file(p / "model.safetensors") for p in (model, tmp_path / "out" / "checkpoint"))
    assert all(torch.equal(before[n], after[n]) for n in before)
    save_file({k: v.double() for k, v in before.items()}, model / "model.safetensors", {"format": "pt"})
    refused(cli("prune", model, "-o", tmp_path / "out2"), "F64", "float32, bfloat16, float16")


def test_tensors_without_a_place(prune: Callable[..., Result], model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    refused(prune(model), "have no place in the model", "model.layers.2.")


def test_tokenizer_of_another_model(prune: Callable[..., Result], model: Path) -> None:
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    name = "model.embed_tokens.weight"
    save_file({**tensors, name: tensors[name][:100].contiguous()}, weights, {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    refused(prune(model), "the tokenizer has ids up to 210", "100 rows")


def test_windows_that_the_model_cannot_hold_are_said_at_once(
    cli: Callable[..., Result], model: Path, tmp_path: Path
) -> None:
    result = cli("run", model, "-o", tmp_path / "out", eval_window=300, eval_tokens=600)
    refused(result, "eval_window 300 is longer than the model's 256 positions")
    assert not (tmp_path / "out").exists()


def test_too_little_text_for_the_damping(cli: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    result = cli("prune", model, "-o", tmp_path / "out", damping=1e-15, calibration_tokens=64, ratio=0.5)
    refused(result, "too few or too alike", "--damping")


def test_ratio_zero_runs_to_the_report(cli: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    code, out, err = cli("run", model, "-o", tmp_path / "out", "--json", ratio=0, latency_runs=0, max_kl=0)
    assert code == 0, err
    report = json.loads(out)
    figures = {f["name"]: f for f in report["verification"]["figures"]}
    assert report["plan"]["ratio"] == 0
    assert figures["accuracy.perplexity"]["ratio"] == 1
    assert figures["accuracy.kl"]["shrunk"] == 0
    weights = [tmp_path / "out" / place / "model.onnx.data" for place in ("onnx", "baseline/onnx")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
