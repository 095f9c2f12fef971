"""`slimexport bench`: what counts as a model, that all are measured alike, what is said of it. No time is asserted."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir
import pytest
from onnx_fixture import VOCAB, export_tiny, tiny_llama

import slimexport.bench.subjects as subjects_module
from slimexport.bench import Settings, bench, results
from slimexport.bench.subjects import gguf, open_all
from slimexport.bench.subjects import onnx as onnx_kind
from slimexport.errors import BadInputError
from slimexport.machine import rates, watch
from slimexport.machine.cores import default_threads
from slimexport.verification import interleaved

SMALL = Settings(prompts=(4,), pasts=(8,), batches=(2,), tokens=4, rounds=6, threads=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with two exports and a baseline, and the checkpoint that they are of."""
    place = tmp_path_factory.mktemp("bench") / "out"
    model = tiny_llama()
    for name in ("onnx", "onnx-int8", "baseline/onnx"):
        export_tiny(model, place / name)
    model.save_pretrained(str(place / "checkpoint"))
    (place / "run.json").write_text("{}")
    return place


@pytest.fixture(autouse=True)
def tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint above has none, and none is needed here."""
    from transformers import LlamaForCausalLM

    import slimexport.checkpoint as checkpoint

    monkeypatch.setattr(checkpoint, "load", lambda path: (LlamaForCausalLM.from_pretrained(str(path)), None))


# -------------------------------------------------------------------------------------------------- what is a model


def names(*paths: Path) -> list[str]:
    return list(open_all(list(paths), SMALL))


def test_every_kind_of_path(place: Path) -> None:
    assert names(place) == ["out/onnx", "out/onnx-int8", "baseline/onnx"]
    assert names(place / "onnx", place / "onnx-int8") == ["onnx", "onnx-int8"]
    assert names(place / "onnx" / "model.onnx", place / "checkpoint") == ["onnx", "checkpoint"]
    assert names(place / "onnx", place / "baseline" / "onnx") == ["out/onnx", "baseline/onnx"]


def test_a_run_directory_without_graphs_is_its_checkpoint(place: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "checkpoint").symlink_to(place / "checkpoint")
    (subject,) = open_all([tmp_path], SMALL).values()
    assert subject.kind == "transformers"


def test_what_is_no_model_is_named(place: Path, tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path, "holds no model"),
        (place / "run.json", "holds no model"),
        (place / "checkpoint" / "config.json", "holds no model"),
    ):
        with pytest.raises(BadInputError, match=words):
            open_all([path], SMALL)
    with pytest.raises(BadInputError, match="named twice"):
        open_all([place / "onnx", place / "onnx" / "model.onnx"], SMALL)
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(BadInputError, match="cannot open"):
        open_all([tmp_path], SMALL)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rounds": 0}, "at least 1"),
        ({"prompts": (0,)}, "at least 1"),
        ({"threads": default_threads() + 1}, "the cores that this process may use"),
        ({"pasts": (), "batches": (2,)}, "name one"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        Settings(**changes)


def test_prompts_that_do_not_fit(place: Path) -> None:
    with pytest.raises(BadInputError, match="onnx: 257 tokens are more than its 256 positions"):
        bench([place / "onnx"], Settings(prompts=(257,), pasts=(), threads=1))


# ------------------------------------------------------------------------------------------------------- measuring


def test_all_kinds_give_the_same_tokens(place: Path) -> None:
    graph, torch_model = open_all([place / "onnx", place / "checkpoint"], SMALL).values()
    prompt = np.arange(5, 14)
    own, other = graph.timed_greedy(prompt, 6), torch_model.timed_greedy(prompt, 6)
    assert own.tokens == other.tokens
    assert len(own.token_seconds) == len(other.token_seconds) == 6
    both = np.stack([prompt, prompt[::-1]])
    assert all(subject.timed_batch(both, 3) > 0 for subject in (graph, torch_model))


def test_a_real_bench_measures_everything(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch.Watch, "busy", None)
    monkeypatch.setattr(results, "defect", lambda values: None)
    made = bench([place / "onnx", place / "checkpoint"], SMALL)
    for name in ("onnx", "checkpoint"):
        wanted = ["prefill.ttft_ms.4", "decode.tpot_ms.8", "batch.tokens_per_s.2"]
        assert [figure.name for figure in made.figures[name]] == wanted
        assert all(figure.valid and figure.value > 0 for figure in made.figures[name])
    first = made.figure("onnx", "decode.tpot_ms.8")
    assert (first.ratio, first.ratio_low, first.ratio_high) == (1, 1, 1)
    assert first.floor == pytest.approx(1e3 * made.models[0]["streamed_bytes"] / made.rates.read_bytes_per_second)
    other = made.figure("checkpoint", "decode.tpot_ms.8")
    assert other.ratio_low <= other.ratio <= other.ratio_high
    low, high = other.ratio_quantiles["p90"][1:]
    assert low <= other.ratio_quantiles["p90"][0] * 1.5
    assert high >= other.ratio_quantiles["p90"][0] / 1.5
    json.dumps(made.to_dict())
    text = results.text(made)
    assert "decode.tpot_ms.8" in text
    assert "x of the floor" in text
    assert "In brackets the ratio to onnx" in text


def fake(seconds: float, calls: list[str], name: str) -> Any:
    def stepped(prompt: Any, steps: int) -> Any:
        calls.append(name)
        return iter([(seconds * len(prompt), 0), *[(seconds, 0)] * steps])

    return SimpleNamespace(
        name=name, kind="fake", precision="fp32", vocabulary=99, max_positions=None, streamed_bytes=10**9,
        stepped=stepped, timed_batch=lambda prompts, steps: None,
    )  # fmt: skip


def faked(monkeypatch: pytest.MonkeyPatch, busy: str | None = None) -> Any:
    calls: list[str] = []
    models = {name: fake(seconds, calls, name) for name, seconds in (("a", 0.02), ("b", 0.01))}
    monkeypatch.setattr(subjects_module, "open_all", lambda paths, settings: models)
    monkeypatch.setattr(rates, "measured", lambda threads: rates.Rates(threads, 1e11, 1e11))
    monkeypatch.setattr(watch.Watch, "busy", busy)
    return bench(["x"], SMALL)


def test_ratios_floors_and_what_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    made = faked(monkeypatch)
    tpot = made.figure("b", "decode.tpot_ms.8")
    assert (tpot.value, tpot.ratio, tpot.floor) == (pytest.approx(10), pytest.approx(0.5), pytest.approx(10))
    assert tpot.quantiles == {q: pytest.approx(10) for q in ("p50", "p90", "p99")}
    assert tpot.ratio_quantiles["p99"] == pytest.approx((0.5, 0.5, 0.5))
    batch = made.figure("b", "batch.tokens_per_s.2")
    assert not batch.valid
    assert "not measured in batches" in batch.note
    line = next(line for line in results.text(made).splitlines() if "floor" in line)
    assert line.split() == ["x", "of", "the", "floor", "2.00", "1.00"]


def test_the_first_model_is_judged_by_its_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    scattered = iter(np.random.default_rng(0).choice([0.01, 0.09, 0.02, 0.08, 0.03], 500))

    def stepped(prompt: Any, steps: int) -> Any:
        seconds = float(next(scattered))
        return iter([(seconds, 0)] * (steps + 1))

    model = fake(0.01, [], "a")
    model.stepped, model.timed_batch = stepped, lambda prompts, steps: float(next(scattered))
    monkeypatch.setattr(subjects_module, "open_all", lambda paths, settings: {"a": model})
    monkeypatch.setattr(rates, "measured", lambda threads: rates.Rates(threads, 1e11, 1e11))
    monkeypatch.setattr(watch.Watch, "busy", None)
    made = bench(["x"], dataclasses.replace(SMALL, rounds=8))
    assert [figure.valid for figure in made.figures["a"]] == [False, False, False]


def test_on_a_busy_machine_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    made = faked(monkeypatch, "the machine was busy: the runs had 40% of their 1 cores")
    assert all(figure.value is None and not figure.valid for of in made.figures.values() for figure in of)
    text = results.text(made)
    assert "repeat it on a quiet machine" in text
    assert "invalid" in text


def test_a_ratio_of_quantiles_has_an_interval_that_covers_it() -> None:
    """Two models whose times are drawn from laws with a known ratio of 90 % quantiles."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        own, other = (rng.exponential(scale, (20, 30)) for scale in (2.0, 1.0))
        _, low, high = results._bootstrap(own, other, 90, rng)
        hits += low <= 2 <= high
    assert 85 <= hits <= 100


def test_rates_are_of_this_machine() -> None:
    found = rates.measured(1)
    assert 1e8 < found.read_bytes_per_second < 1e13
    assert 1e8 < found.flops_per_second < 1e15


def test_streamed_bytes_leave_out_tables_of_which_rows_are_taken(place: Path) -> None:
    path = place / "onnx" / "model.onnx"
    graph = onnx_ir.load(str(path)).graph
    everything = sum(value.const_value.nbytes for value in graph.initializers.values())
    tables = graph.initializers["model.embed_tokens.weight"].const_value.nbytes
    assert tables == VOCAB * 48 * 4
    left_out = everything - onnx_kind.streamed_bytes(graph)
    assert onnx_kind.shares_buffers(graph)
    assert tables <= left_out <= tables + 2 * 256 * 8 * 4 + 100  # cosines and sines of the positions


# ------------------------------------------------------------------------------------------------------------ GGUF


def test_gguf_through_llama_cpp_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Against its documented interface: llama-cpp-python comes as source only and is not installed here."""
    seen: list[Any] = []

    class Llama:
        def __init__(self, path: str, **options: Any):
            seen.append(options)
            self.eval_logits: list[list[float]] = []

        def n_vocab(self) -> int:
            return 3

        def reset(self) -> None:
            seen.append("reset")

        def eval(self, tokens: list[int]) -> None:
            self.eval_logits = [[0.0, 1.0, float(len(tokens))]]

    module = ModuleType("llama_cpp")
    module.Llama = Llama  # type: ignore[attr-defined]
    path = tmp_path / "m.gguf"
    path.write_bytes(b"x" * 10)
    installed: set[str] = set()
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: name if name in installed else None)
    with pytest.raises(BadInputError, match=r"needs llama\.cpp: pip install 'slimexport\[gguf\]'"):
        gguf.open_one(path, "m", SMALL)
    installed.add("llama_cpp")
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    (subject,) = open_all([path], SMALL).values()
    assert seen[0]["n_ctx"] == 13
    assert seen[0]["n_threads"] == 1
    assert [token for _, token in subject.stepped(np.array([0, 1, 2]), 2)] == [2, 1, 1]
    assert (subject.vocabulary, subject.streamed_bytes) == (3, None)


def test_gguf_files_are_found_beside_graphs(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("gguf", "gguf-int8", "baseline/gguf"):
        (run / name).mkdir(parents=True)
        (run / name / "model.gguf").touch()
    (run / "run.json").write_text("{}")
    assert gguf.find(run) == [run / "gguf", run / "gguf-int8", run / "baseline" / "gguf"]
    assert gguf.find(run / "gguf") == [run / "gguf"]
    assert gguf.find(run / "gguf" / "model.gguf") == [run / "gguf" / "model.gguf"]
    assert gguf.find(run / "run.json") == gguf.find(place / "onnx") == []
    (run / "onnx").symlink_to(place / "onnx")
    assert [kind.__name__.rpartition(".")[2] for kind, _ in subjects_module._find(run)] == ["onnx", *["gguf"] * 3]


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    models = {name: fake(0.01, calls, name) for name in "abc"}
    quantities = interleaved.Quantities((4,), (), 2)
    samples = interleaved.measure(models, quantities, np.arange, rounds=2, threads=1)
    assert samples.orders == [["a", "b", "c"], ["c", "b", "a"]]
    assert calls[-12:] == [name for name in "abccba" for _ in range(2)]
