"""Ours beside whatever else would run the same checkpoint: decoding and prefill, dense and shrunk, in every precision.

    python benchmarks/latency.py --work DIR --build        # makes every graph; may share the machine
    python benchmarks/latency.py --work DIR [--threads 1,2] [--only dense/fp32] [--rounds 12]     # may not
    python benchmarks/latency.py --render      # the table, from the JSON alone

One group is one model in one precision at one number of threads; all its candidates take turns in one run
(`slimexport.verification.interleaved`), and every ratio is to ours, above 1 where ours is faster. A machine that had
other work to do gives no row: the group is measured again by the next call.

The shrunk model is 30 % smaller, `--fast --layout uniform`, so that every tool can read it. What is quantised is the
same model off the 4-bit grid that the demo model's weights lie on (offgrid.py). Candidates of one group:

    slimexport                 our export, as `slimexport run` writes it
    genai builder              onnxruntime_genai.models.builder with its defaults
    genai builder, best        with fuse_mlp_gate_up, prune_lm_head, and shared_embeddings where it takes that
    transformers.exporters     the graph that transformers traces itself, none of our passes over it
    torch, torch.compile       transformers on the CPU, in float32
    openvino                   OpenVINO's own runtime (rivals/openvino.py)
    llama.cpp                  the same model as `--target gguf` writes it (int8: Q8_0, int4: Q4_1)

Graphs of others run as ours do: the cache in one place where all of it is GroupQueryAttention's.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import RESULTS, load_rows, save_rows, table
from rivals import Unsupported, openvino

RATIO = 0.3
PRECISIONS = ("fp32", "int8", "int4")
MODELS = ("dense", "shrunk")
OURS = "slimexport"
BEST = {"fuse_mlp_gate_up": "true", "prune_lm_head": "true"}
ONNX = ("genai builder", "genai builder, best", "transformers.exporters")
QUANTITIES = ("prefill.ttft_ms.128", "prefill.ttft_ms.512", "decode.tpot_ms.128", "decode.tpot_ms.512")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--work", type=Path, help="keeps checkpoints and graphs")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", help="groups, such as dense/fp32, joined by commas")
    parser.add_argument("--candidates", help="parts of their names, joined by commas; ours is always there")
    parser.add_argument("--out", type=Path, default=RESULTS / "latency.json")
    parser.add_argument("--build", action="store_true", help="only make what is missing, and measure nothing")
    parser.add_argument("--busy", action="store_true", help="keep rows of a busy machine, to try the script out")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    rows = load_rows(options.out)
    if not options.render:
        for model in MODELS:
            for precision in PRECISIONS:
                for threads in map(int, options.threads.split(",")):
                    if options.only is None or f"{model}/{precision}" in options.only.split(","):
                        group(options, rows, model, precision, threads)
    print(render(rows))


def group(options: argparse.Namespace, rows: list[dict[str, Any]], model: str, precision: str, threads: int) -> None:
    """Measures what is missing of one group, and keeps it."""
    key = f"{model}/{precision}/{threads}"
    if any(row["group"] == key for row in rows):
        return
    from slimexport.bench import Settings
    from slimexport.bench.results import result
    from slimexport.machine import huge_pages, rates
    from slimexport.verification import interleaved

    settings = Settings(prompts=(128, 512), pasts=(128, 512), rounds=options.rounds, threads=threads)
    wanted = options.candidates.split(",") if options.candidates else None
    subjects: dict[str, Any] = {}
    made_of = options.work / model / precision
    for name, (build, opened) in CANDIDATES.items():
        if name != OURS and wanted is not None and not any(part in name for part in wanted):
            continue
        place = made_of / name.replace(" ", "-").replace(",", "")
        try:
            if not place.is_dir():
                build(options, model, precision, place)
            if not options.build:
                subjects[name] = opened(place, name, settings, precision)
        except Unsupported as error:
            print(f"{key}: {name}: {error}", flush=True)
    if options.build:
        return
    import numpy as np

    rng = np.random.default_rng(0)
    vocabulary = min(subject.vocabulary for subject in subjects.values())
    huge_pages.ask()
    most = rates.measured(threads)
    samples = interleaved.measure(
        subjects, settings.quantities, lambda n: rng.integers(0, vocabulary, n), rounds=settings.rounds, threads=threads
    )
    made = result(subjects, settings, most, samples)
    if samples.busy and not options.busy:
        print(f"{key}: {samples.busy}; not kept", flush=True)
        return
    for name in subjects:
        rows.append({
            "group": key, "candidate": name, "rounds": settings.rounds, "rates": dataclasses.asdict(most),
            "figures": [dataclasses.asdict(figure) for figure in made.figures[name]],
            "cpu": made.environment["cpu"], "packages": made.environment["packages"], **samples.watched,
        })  # fmt: skip
    save_rows(options.out, rows)


# ------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint(options: argparse.Namespace, model: str, precision: str) -> Path:
    """The Hugging Face directory that every candidate of a group is made from."""
    place: Path = options.work / "checkpoints" / (f"{model}-off-grid" if precision.startswith("int") else model)
    if place.is_dir():
        return place
    import slimexport
    from slimexport.artifacts import staged_directory
    from slimexport.config import RunConfig
    from slimexport.loading import load_model

    if model == "dense":
        loaded = load_model(RunConfig(model=options.model))
        found, tokenizer = loaded.model.float(), loaded.tokenizer
    else:
        pruned = options.work / "pruned"
        if not (pruned / "checkpoint").is_dir():
            slimexport.prune(RunConfig(model=options.model, ratio=RATIO, fast=True, layout="uniform"), pruned)
        found, tokenizer = slimexport.load(pruned)
    if precision.startswith("int"):
        from offgrid import off_grid

        found = off_grid(found)
    with staged_directory(place) as partial:
        found.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))
    return place


def loaded(options: argparse.Namespace, model: str, precision: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = str(checkpoint(options, model, precision))
    return AutoModelForCausalLM.from_pretrained(place, dtype="float32").eval(), AutoTokenizer.from_pretrained(place)


# -------------------------------------------------------------------------------------------------------- candidates


def ours(
    options: argparse.Namespace, model: str, precision: str, place: Path, target: str = "onnx", **changes: Any
) -> None:
    from slimexport.artifacts import staged_directory
    from slimexport.targets import registry
    from slimexport.targets.base import ExportOptions

    found, tokenizer = loaded(options, model, precision)
    with staged_directory(place) as partial:
        registry.get(target).export(found, tokenizer, partial, ExportOptions(precision=precision, **changes))


def traced(options: argparse.Namespace, model: str, precision: str, place: Path) -> None:
    if precision != "fp32":
        raise Unsupported("transformers.exporters does not quantise")
    ours(options, model, precision, place, builder="transformers", without=("gate_up", "last_logits"))


def genai(extra: Mapping[str, str]) -> Callable[..., None]:
    def build(options: argparse.Namespace, model: str, precision: str, place: Path) -> None:
        from slimexport.artifacts import staged_directory

        with staged_directory(place) as partial:
            words = [
                "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint(options, model, precision)),
                "-o", str(partial), "-p", precision, "-e", "cpu", "-c", str(options.work / "cache"),
            ]  # fmt: skip
            if extra:
                words += ["--extra_options", *(f"{key}={value}" for key, value in extra.items())]
            done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
            if done.returncode:
                raise Unsupported((done.stderr.strip().splitlines() or ["no message"])[-1])

    return build


def torch_only(options: argparse.Namespace, model: str, precision: str, place: Path) -> None:
    if precision != "fp32":
        raise Unsupported("torch is measured in float32")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(checkpoint(options, model, precision).resolve())


def gguf(options: argparse.Namespace, model: str, precision: str, place: Path) -> None:
    ours(options, model, precision, place, target="gguf")


def in_llama_cpp(place: Path, name: str, settings: Any, precision: str) -> Any:
    from slimexport.bench.subjects import gguf

    return gguf.open_one(place, name, settings)


def in_openvino(options: argparse.Namespace, model: str, precision: str, place: Path) -> None:
    found, _ = loaded(options, model, precision)
    openvino.build(found, precision, place)


def graph(place: Path, name: str, settings: Any, precision: str) -> Any:
    from slimexport.bench.subjects import onnx

    subject = onnx.open_one(place, name, settings)
    subject.precision = precision
    return subject


def in_torch(compiled: bool) -> Callable[..., Any]:
    def opened(place: Path, name: str, settings: Any, precision: str) -> Any:
        import torch

        from slimexport.bench.subjects import transformers

        subject = transformers.open_one(place, name, settings)
        if compiled:
            subject.model = torch.compile(subject.model, dynamic=True)
        return subject

    return opened


CANDIDATES: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    OURS: (ours, graph),
    "genai builder": (genai({}), graph),
    "genai builder, best": (genai(BEST), graph),
    "transformers.exporters": (traced, graph),
    "torch": (torch_only, in_torch(False)),
    "torch.compile": (torch_only, in_torch(True)),
    "openvino": (in_openvino, openvino.opened),
    "llama.cpp": (gguf, in_llama_cpp),
}


# ------------------------------------------------------------------------------------------------------------- table


def render(rows: list[dict[str, Any]]) -> str:
    """One line a candidate of a group: its times, and in brackets how many times ours is as fast."""
    head = ["model, precision, threads", "candidate", *QUANTITIES]
    body = []
    for row in rows:
        figures = {figure["name"]: figure for figure in row["figures"]}
        body.append([row["group"].replace("/", ", "), row["candidate"], *(_cell(figures.get(q)) for q in QUANTITIES)])
    return table(head, body)


def summary(rows: list[dict[str, Any]]) -> str:
    """One line a group: our times, how many times as fast as the best ONNX rival, and every rival that is faster."""
    head = ["model, precision, threads", *(_short(q) for q in QUANTITIES), "faster than ours"]
    body = []
    for group in dict.fromkeys(row["group"] for row in rows):
        found = {row["candidate"]: {f["name"]: f for f in row["figures"]} for row in rows if row["group"] == group}
        cells, faster = [], []
        for quantity in QUANTITIES:
            rivals = {name: of[quantity] for name, of in found.items() if name != OURS and of[quantity]["valid"]}
            onnx = [figure["ratio"] for name, figure in rivals.items() if name in ONNX]
            own = found[OURS][quantity]
            cells.append(_cell(own) + (f" ({min(onnx):.2f})" if onnx and own["valid"] else ""))
            ahead = {name: 1 / figure["ratio"] for name, figure in rivals.items() if figure["ratio_high"] < 1}
            faster += [f"{name} {times:.2f} x ({_short(quantity)})" for name, times in ahead.items()]
        body.append([group.replace("/", ", "), *cells, "; ".join(faster) or "none"])
    return table(head, body)


def _short(quantity: str) -> str:
    """`decode.tpot_ms.128` -> `TPOT 128`."""
    _, name, length = quantity.split(".")
    return f"{name.removesuffix('_ms').upper()} {length}"


def _cell(figure: dict[str, Any] | None) -> str:
    if figure is None or not figure["valid"]:
        return "–"
    if figure["ratio"] == 1.0:
        return f"{figure['value']:.1f}"
    return f"{figure['value']:.1f} ({figure['ratio']:.2f}, {figure['ratio_low']:.2f}-{figure['ratio_high']:.2f})"


if __name__ == "__main__":
    main()
