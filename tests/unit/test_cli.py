"""The command line, with a pipeline that only records what it was asked: options, precedence, output, exit codes."""

from __future__ import annotations

import errno
import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report_data

import slimexport
from slimexport.cli import main
from slimexport.config import RunConfig
from slimexport.errors import BadInputError, GateFailedError, NotReproducedError
from slimexport.gates.declared import Gate
from slimexport.options import STAGES


class Pipeline(types.ModuleType):
    """Stands in for slimexport.pipeline; `calls` is what the commands asked for, `result` what they get."""

    def __init__(self) -> None:
        super().__init__("slimexport.pipeline")
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.raises: BaseException | None = None
        made = report_data.report()
        self.results: dict[str, Any] = {
            "run": made, "report": made, "plan": made.plan, "prune": made.checkpoint, "export": made.exports,
            "verify": made.verification,
        }  # fmt: skip
        for name in self.results:
            setattr(self, name, self._function(name))
        self.verified = lambda output: {"onnx": made.verification}

    def _function(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            print("a library's chatter")  # must not reach stdout
            self.calls.append((name, args, kwargs))
            if self.raises:
                raise self.raises
            return self.results[name]

        return call

    @property
    def config(self) -> RunConfig:
        return self.calls[-1][1][0]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    fake = Pipeline()
    monkeypatch.setitem(sys.modules, "slimexport.pipeline", fake)
    monkeypatch.setattr(slimexport, "pipeline", fake, raising=False)
    return fake


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_run_passes_the_config_and_prints_the_summary(cli, pipeline, tmp_path) -> None:
    code, out, err = cli("run", "m", "-o", tmp_path / "out", "--ratio", "0.3", "--force")
    assert code == 0
    name, args, kwargs = pipeline.calls[-1]
    assert (name, args[0], args[1]) == ("run", RunConfig(model="m", ratio=0.3), tmp_path / "out")
    assert kwargs["force"] is True
    assert kwargs["resume"] is False
    assert out.startswith("PASSED: all 2 gates held.")
    assert str(tmp_path / "out" / "report" / "report.md") in out
    assert "chatter" not in out
    assert "chatter" in err


def test_verify_prints_every_export(cli, pipeline, tmp_path) -> None:
    one = pipeline.results["verify"]
    assert "onnx\n" not in cli("verify", tmp_path)[1]
    pipeline.verified = lambda output: {"onnx": one, "onnx-int8": one}
    code, out, _ = cli("verify", tmp_path)
    assert code == 0
    assert out.count("accuracy.kl") == 2
    assert "\n\nonnx-int8\nfigure" in out
    data = json.loads(cli("verify", tmp_path, "--json")[1])
    assert list(data["others"]) == ["onnx-int8"]
    assert data["figures"] == data["others"]["onnx-int8"]["figures"]


def test_failed_gate_exits_3_and_names_it(cli, pipeline, tmp_path) -> None:
    pipeline.results["run"] = report_data.report(("accuracy.kl<=0.1",))
    code, out, err = cli("run", "m", "-o", tmp_path)
    assert code == 3
    assert "accuracy.kl 0.241 <= 0.1 does not hold" in out
    assert err.splitlines()[-1] == "FAILED: the gate: accuracy.kl 0.241 <= 0.1 does not hold: 141 % too much."
    pipeline.results["report"] = pipeline.results["run"]
    assert cli("report", tmp_path)[0] == 3


def test_the_report_goes_where_github_shows_it(cli, pipeline, tmp_path, monkeypatch) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    (tmp_path / "out" / "report").mkdir(parents=True)
    (tmp_path / "out" / "report" / "report.md").write_text("# PASSED\n")
    assert cli("run", "m", "-o", tmp_path / "out")[0] == 0
    assert summary.read_text() == "before\n# PASSED\n\n"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "such.md"))
    assert cli("run", "m", "-o", tmp_path / "out")[0] == 0


FLAGS: dict[str, tuple[list[str], Any]] = {
    "revision": (["--revision", "main"], "main"),
    "architecture": (["--architecture", "auto"], "auto"),
    "trust_remote_code": (["--trust-remote-code"], True),
    "device": (["--device", "cuda:1"], "cuda:1"),
    "dtype": (["--dtype", "bfloat16"], "bfloat16"),
    "save_dtype": (["--save-dtype", "float16"], "float16"),
    "seed": (["--seed", "7"], 7),
    "calibration": (["--calibration", "x.txt"], "x.txt"),
    "calibration_tokens": (["--calibration-tokens", "99"], 99),
    "sequence_length": (["--sequence-length", "64"], 64),
    "ratio": (["--ratio", "0"], 0.0),
    "criterion": (["--criterion", "flap"], "flap"),
    "allocation": (["--allocation", "uniform"], "uniform"),
    "fast": (["--fast"], True),
    "sizes": (["--sizes", "/s.yaml"], Path("/s.yaml")),
    "costs": (["--costs", "/c.json"], Path("/c.json")),
    "probe_tokens": (["--probe-tokens", "64"], 64),
    "search_seconds": (["--search-seconds", "9.5"], 9.5),
    "search_evaluations": (["--search-evaluations", "12"], 12),
    "refit": (["--refit", "0.5"], 0.5),
    "curvature_tokens": (["--curvature-tokens", "128"], 128),
    "bias_compensation": (["--bias-compensation", "off"], "off"),
    "recover": (["--recover", "distill"], "distill"),
    "recover_budget": (["--recover-budget", "90s"], "90s"),
    "recover_text": (["--recover-text", "mix:news=1,code=1"], "mix:news=1,code=1"),
    "recover_learning_rate": (["--recover-learning-rate", "1e-4"], 1e-4),
    "recover_optimizer": (["--recover-optimizer", "adamw-8bit"], "adamw-8bit"),
    "recover_rank": (["--recover-rank", "4"], 4),
    "recover_sequences": (["--recover-sequences", "4"], 4),
    "recover_length": (["--recover-length", "256"], 256),
    "recover_text_share": (["--recover-text-share", "0.5"], 0.5),
    "recover_temperature": (["--recover-temperature", "2"], 2.0),
    "recover_hidden_weight": (["--recover-hidden-weight", "0.1"], 0.1),
    "first_ratio": (["--first-ratio", "0.1"], 0.1),
    "layout": (["--layout", "uniform"], "uniform"),
    "round_to": (["--round-to", "8"], 8),
    "group_size_start": (["--group-size-start", "16"], 16),
    "group_size_end": (["--group-size-end", "2"], 2),
    "damping": (["--damping", "0.1"], 0.1),
    "provider_option": (["--provider-option", "device_id=1"], ("device_id=1",)),
    "precision": (["--precision", "int8,fp32"], ("int8", "fp32")),
    "without_pass": (["--without-pass", "gate_up"], ("gate_up",)),
    "rounding_tokens": (["--rounding-tokens", "0"], 0),
    "target": (["--target", "onnx,genai", "--target", "x"], ("onnx", "genai", "x")),
    "exporter": (["--exporter", "mobius"], "mobius"),
    "provider": (["--provider", "cuda"], "cuda"),
    "baseline": (["--no-baseline"], False),
    "verify": (["--verify", "light"], "light"),
    "baseline_cache": (["--baseline-cache", "/c"], Path("/c")),
    "head_weight": (["--head-weight", "0.5"], 0.5),
    "eval_text": (["--eval-text", "e.txt"], "e.txt"),
    "eval_tokens": (["--eval-tokens", "100"], 100),
    "eval_window": (["--eval-window", "32"], 32),
    "tasks": (["--tasks", "arc_easy=q.jsonl,hellaswag"], ("arc_easy=q.jsonl", "hellaswag")),
    "task_limit": (["--task-limit", "20"], 20),
    "continuations": (["--continuations", "0"], 0),
    "prompt_lengths": (["--prompt-lengths", "16, 32"], (16, 32)),
    "decode_tokens": (["--decode-tokens", "8"], 8),
    "latency_runs": (["--latency-runs", "0"], 0),
    "max_latency_runs": (["--max-latency-runs", "20"], 20),
    "threads": (["--threads", "2"], 2),
    "max_perplexity_ratio": (["--max-perplexity-ratio", "1.5"], 1.5),
    "max_memory": (["--max-memory", "6GB"], "6GB"),
    "max_device_memory": (["--max-device-memory", "24GiB"], "24GiB"),
    "max_kl": (["--max-kl", "0.2"], 0.2),
    "min_speedup": (["--min-speedup", "1.2"], 1.2),
    "max_latency_ms": (["--max-latency-ms", "20"], 20.0),
    "max_size_mb": (["--max-size-mb", "400"], 400.0),
    "gates": (
        ["--gate", "decode.tpot_ms<=9ms", "--gate", "ratio(accuracy.kl)>=2"],
        (Gate.parse("decode.tpot_ms<=9ms"), Gate.parse("ratio(accuracy.kl)>=2")),
    ),
    "against": (["--against", "report.json"], Path("report.json")),
    "on_undecided": (["--on-undecided", "warn"], "warn"),
}


def test_every_field_has_a_flag_of_run(cli, pipeline, tmp_path) -> None:
    assert sorted(FLAGS) == sorted(name for names in STAGES.values() for name in names)
    for name, (words, value) in FLAGS.items():
        assert cli("run", "m", "-o", tmp_path, *words)[0] == 0
        assert pipeline.config == RunConfig(model="m", **{name: value})


def test_precedence_is_default_recipe_flag(cli, pipeline, tmp_path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: from-recipe\nratio: 0.4\nseed: 3\nbaseline: false\ntarget: [genai]\n")
    assert cli("run", "-o", tmp_path, "--recipe", recipe, "--ratio", "0.25", "--baseline")[0] == 0
    config = pipeline.config
    # 0.25 is also the default: a flag that is typed wins even so.
    assert (config.model, config.ratio, config.seed, config.baseline) == ("from-recipe", 0.25, 3, True)
    assert config.target == ("genai",)
    assert config.damping == RunConfig(model="m").damping
    assert cli("run", "m", "-o", tmp_path, "--recipe", "ci", "--gate", "load.seconds<=9")[0] == 0
    assert [str(gate) for gate in pipeline.config.gates][1:] == ["ratio(size.export_mb)<=0.85", "load.seconds<=9"]
    assert cli("plan", "typed", "--recipe", recipe)[0] == 0
    assert pipeline.config.model == "typed"


def test_commands_on_a_run_directory_pass_only_their_own_overrides(cli, pipeline, tmp_path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: m\nratio: 0.4\neval_tokens: 99\nexporter: mobius\nmax_kl: 0.3\n")
    cli("verify", tmp_path, "--recipe", recipe, "--threads", "2", "--resume")
    name, args, kwargs = pipeline.calls[-1]
    assert (name, args) == ("verify", (tmp_path, {"eval_tokens": 99, "threads": 2}))
    assert kwargs["resume"] is True
    cli("export", tmp_path, "--recipe", recipe)
    assert pipeline.calls[-1][1] == (tmp_path, {"exporter": "mobius"})
    cli("report", tmp_path, "--recipe", recipe, "--max-kl", "0.1")
    assert pipeline.calls[-1][1] == (tmp_path, {"max_kl": 0.1})


@pytest.mark.parametrize("words", [["run", "m", "-o"], ["prune", "m", "-o"], ["export"], ["verify"], ["report"]])
def test_json_is_the_only_thing_on_stdout(cli, pipeline, tmp_path, words) -> None:
    code, out, _ = cli(*words, tmp_path, "--json")
    assert code == 0
    assert json.loads(out)


def test_plan_prints_sizes_and_savings(cli, pipeline) -> None:
    code, out, _ = cli("plan", "m")
    assert code == 0
    assert "0 to 1" in out
    assert "ideal speed-up: decode 1.25x" in out
    assert json.loads(cli("plan", "m", "--json")[1])["blocks"][0]["channels"] == 1472


def test_other_results_for_people(cli, pipeline, tmp_path) -> None:
    assert f"{tmp_path}/checkpoint: 107,900,000 parameters" in cli("prune", "m", "-o", tmp_path)[1]
    assert "onnx: out/onnx (onnx, mobius, fp32, cpu)" in cli("export", tmp_path)[1]
    assert "accuracy.perplexity" in cli("verify", tmp_path)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rum"], "No such command 'rum'. Did you mean 'run'?"),
        (["run", "m", "-o", "x", "--rato", "1"], "'--ratio'"),
        (["run", "m", "-o", "x", "--ratio", "much"], "'much' is not a valid float"),
        (["run", "m", "-o", "x", "--dtype", "int3"], "'int3' is not one of"),
        (["run", "m", "-o", "x", "--gate", "a<1"], "'a<1' is not a gate"),
        (["run", "m", "-o", "x", "--gate", "rato(a)<=1"], "Did you mean 'ratio'?"),
        (
            ["run", "m", "-o", "x", "--gate", "accuracy.kll<=1"],
            "--gate: no figure 'accuracy.kll'. Did you mean 'accuracy.kl'?",
        ),
        (["run", "m", "-o", "x", "--gate", "prefill.ttft_ms.64<=1"], "prompts of 32, 128, 512 are measured"),
        (["run", "m", "-o", "x", "--gate", "decode.tpot_ms<=1s"], "decode.tpot_ms is in ms, not in s"),
        (["run", "m", "-o", "x", "--prompt-lengths", "1,b"], "'b' is not a valid integer"),
        (["run", "m", "-o", "x", "--force", "--resume"], "give one of them"),
        (["run", "m"], "'--output'"),
        (["run", "-o", "x"], "Missing argument 'MODEL'"),
        (["plan", "m", "--max-kl", "1"], "No such option"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(cli, pipeline, words, message) -> None:
    code, out, err = cli(*words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert not pipeline.calls
    code, out, err = cli(*words, "--json")
    assert (code, err) == (2, "")
    assert json.loads(out)["exit_code"] == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BadInputError("no model here"), 4, "Error: no model here"),
        (NotReproducedError("decode differs"), 5, "Error: decode differs"),
        (GateFailedError("accuracy.kl"), 3, "Error: accuracy.kl"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), 4, "Error: No space left on device: /out/x."),
        (OSError(errno.EROFS, "Read-only file system", "/out"), 4, "Error: Read-only file system: /out."),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/file/x"), 4, "Error: Not a directory: /file/x."),
        (RuntimeError("Could not determine home directory."), 4, "Error: A path begins with ~ and the name of no user"),
        (RuntimeError("serializing: No space left on device (os error 28)"), 4, "Error: serializing: No space left"),
        (KeyError("bug"), 1, "Error: internal error: KeyError: 'bug' (--debug shows the traceback)"),
        (KeyboardInterrupt(), 130, "Error: Interrupted."),
    ],
)
def test_every_error_is_one_line_with_its_code(cli, pipeline, tmp_path, error, code, message) -> None:
    pipeline.raises = error
    got, out, err = cli("prune", "m", "-o", tmp_path, "--quiet")
    assert (got, out) == (code, "")
    last = err.rstrip("\n").split("\n")[-1]
    assert last.startswith(message)
    assert "Traceback" not in err
    got, out, _ = cli("prune", "m", "-o", tmp_path, "--json")
    assert got == code
    assert json.loads(out)["exit_code"] == code
    if code == 1:
        assert "Traceback" in cli("prune", "m", "-o", tmp_path, "--debug")[2]


def test_names_are_no_paths_that_would_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in the working directory itself is one like any other; of files in it, it is still said."""
    from slimexport.run_directory import RunDirectory
    from slimexport.stages.inputs import input_paths

    monkeypatch.chdir(tmp_path)
    RunDirectory(tmp_path).check_holds_none(input_paths(RunConfig(model="smollm2-135m")))
    (tmp_path / "text.txt").write_text("w1")
    with pytest.raises(BadInputError, match=r"text\.txt lies in"):
        RunDirectory(tmp_path).check_holds_none(input_paths(RunConfig(model="a/b", calibration="text.txt")))


def test_bad_recipe_exits_4_before_anything_runs(cli, pipeline, tmp_path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("raito: 0.3\n")
    for words in (["run", "m", "-o", tmp_path], ["verify", tmp_path], ["plan", "m"]):
        code, _, err = cli(*words, "--recipe", recipe)
        assert code == 4
        assert "Did you mean 'ratio'?" in err
    recipe.write_text("ratio: [1]\n")
    assert cli("run", "m", "-o", tmp_path, "--recipe", recipe)[0] == 4
    assert "--ratio: Input should be less than 1" in cli("plan", "m", "--ratio", "1.5")[2]
    assert not pipeline.calls


def test_directory_commands_need_a_directory(cli, pipeline, tmp_path) -> None:
    for command in ("export", "verify", "report"):
        code, _, err = cli(command, tmp_path / "none")
        assert code == 4
        assert "is not a directory" in err


def test_help_shows_defaults_by_stage(cli) -> None:
    code, out, _ = cli("run", "--help")
    assert code == 0
    for stage in STAGES:
        assert f"{stage.capitalize()}:" in out
    assert "[default: 0.25]" in " ".join(out.split())
    assert "Gate:" not in cli("plan", "--help")[1]
    assert "Load:" not in cli("report", "--help")[1]


def test_no_command_prints_the_help(cli) -> None:
    code, out, err = cli()
    assert "Usage:" in out + err
    assert "Error" not in err
    assert code in (0, 2)  # Click 8.1 and 8.2 differ


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, slimexport.cli\n"
        "try: slimexport.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'onnxruntime', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_api_is_lazy_and_complete(pipeline) -> None:
    assert slimexport.run is pipeline.run
    assert slimexport.RunConfig is RunConfig
    assert set(dir(slimexport)) >= {"run", "plan", "prune", "export", "verify", "report", "load", "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'prnue'"):
        slimexport.prnue  # noqa: B018


def test_no_module_takes_the_name_of_a_function() -> None:
    # Importing slimexport/export.py would put the module where slimexport.export(...) is called.
    for name in ("run", "plan", "prune", "export", "verify", "report", "load"):
        assert importlib.util.find_spec(f"slimexport.{name}") is None, name


def test_architectures_lists_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    from slimexport.architectures import registry

    with pytest.raises(SystemExit) as done:
        main(["architectures", "--json"])
    assert done.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["family"] for row in found["families"]] == registry.names()
    with pytest.raises(SystemExit):
        main(["architectures"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "family"
    assert any(line.split()[:2] == ["olmo2", "no"] for line in lines)


def test_several_reports_are_compared(cli, pipeline, tmp_path, monkeypatch) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    code, out, _ = cli("report", first, second, "-o", tmp_path / "both.html")
    assert code == 0
    assert out.split("\n")[0].split() == [str(first), str(second)]
    assert "<table" in (tmp_path / "both.html").read_text()
    assert list(json.loads(cli("report", first, second, "--json")[1])["reports"]) == [str(first), str(second)]
    assert cli("report", first, "-o", tmp_path / "one.html")[0] == 2
    assert cli("report", first, second, "-o", tmp_path / "both.pdf")[0] == 2
    shown = []
    monkeypatch.setattr("click.launch", shown.append)
    assert cli("report", first, "--open")[0] == 0
    assert shown == [str(first / "report" / "report.html")]
    pipeline.results["report"] = report_data.report(("accuracy.kl<=0.1",))
    assert cli("report", first, second)[0] == 3
