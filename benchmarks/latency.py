"""Ours beside whatever else would run the same checkpoint: decoding and prefill, dense and shrunk, in every precision.

    python benchmarks/latency.py --work DIR --build        # makes every graph; may share the machine
    python benchmarks/latency.py --work DIR [--threads 1,2] [--only dense/fp32] [--processes 4]   # may not
    python benchmarks/latency.py --render      # the table, from the JSON alone

One group is one model in one precision at one number of threads; all its candidates take turns in one process
(`slimexport.verification.interleaved`), every process opens them in another order, and ratios are to ours, above 1
where ours is faster. Several processes, because where the system puts a graph's weights makes it some percent faster or
slower for as long as it is open: the interval of a ratio is a bootstrap over processes, and over rounds within them.
What was measured while the machine had other work to do is measured again by the next call.

The shrunk model is 30 % smaller, `--fast --layout uniform`, so that every tool can read it. What is quantised is the
same model off the 4-bit grid that the demo model's weights lie on (offgrid.py). Candidates of one group:

    slimexport                 our export, as `slimexport run` writes it
    genai builder              onnxruntime_genai.models.builder with its defaults
    genai builder, best        with fuse_mlp_gate_up, prune_lm_head, and shared_embeddings where it takes that
    transformers.exporters     the graph that transformers traces itself, none of our passes over it
    torch, torch.compile       transformers on the CPU, in float32
    openvino                   OpenVINO's own runtime (rivals/openvino.py), fp32 in float32
    openvino, bfloat16         the same as it comes: it computes in bfloat16 where the CPU can
    llama.cpp                  the same model as `--target gguf` writes it (int8: Q8_0, int4: Q4_1)

Graphs of others run as ours do: the cache in one place where all of it is GroupQueryAttention's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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
LENGTHS = (128, 512)  # of prompts, and of what is there when decoding begins
QUANTITIES = tuple(f"{name}.{n}" for name in ("prefill.ttft_ms", "decode.tpot_ms") for n in LENGTHS)
DRAWS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--work", type=Path, help="keeps checkpoints and graphs")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="in each process, after a warm-up")
    parser.add_argument("--only", help="groups, such as dense/fp32, joined by commas")
    parser.add_argument("--candidates", help="parts of their names, joined by commas; ours is always there")
    parser.add_argument("--out", type=Path, default=RESULTS / "latency.json")
    parser.add_argument("--build", action="store_true", help="only make what is missing, and measure nothing")
    parser.add_argument("--busy", action="store_true", help="keep rows of a busy machine, to try the script out")
    parser.add_argument("--once", type=int, help="the number of this process, of the one group that is named")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if options.once is not None:
        print(json.dumps(once(options, *options.only.split("/"), int(options.threads), options.once)))
        return
    rows = load_rows(options.out)
    if not options.render:
        for threads in map(int, options.threads.split(",")):
            for model in MODELS:
                for precision in PRECISIONS:
                    if options.only is None or f"{model}/{precision}" in options.only.split(","):
                        group(options, rows, model, precision, threads)
    print(render(rows))


def group(options: argparse.Namespace, rows: list[dict[str, Any]], model: str, precision: str, threads: int) -> None:
    """Measures what is missing of one group, each process as soon as it ends."""
    if options.build:
        for name in candidates(options):
            place_of(options, model, precision, name)
        return
    key = f"{model}/{precision}/{threads}"
    # torch is far behind and takes long: one more process, beside ours alone.
    torch = precision == "fp32" and any(name.startswith("torch") for name in candidates(options))
    for number in range(options.processes + torch):
        if any((row["group"], row["process"]) == (key, number) for row in rows):
            continue
        words = [sys.executable, __file__, "--work", str(options.work), "--only", f"{model}/{precision}"]
        words += ["--threads", str(threads), "--rounds", str(options.rounds)]
        words += ["--once", str(number), "--processes", str(options.processes)]
        words += ["--candidates", options.candidates] if options.candidates else []
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        made = json.loads(done.stdout.splitlines()[-1])
        if made["busy"] and not options.busy:
            print(f"{key}, process {number}: {made['busy']}; not kept", flush=True)
            continue
        rows.append({"group": key, "process": number, **made})
        save_rows(options.out, rows)


def candidates(options: argparse.Namespace) -> list[str]:
    wanted = options.candidates.split(",") if options.candidates else None
    return [name for name in CANDIDATES if name == OURS or wanted is None or any(part in name for part in wanted)]


def place_of(options: argparse.Namespace, model: str, precision: str, name: str) -> Path | None:
    """Where the candidate lies, made if it is not there; None where it cannot be had."""
    place: Path = options.work / model / precision / name.replace(" ", "-").replace(",", "")
    try:
        if not place.is_dir():
            CANDIDATES[name][0](options, model, precision, place)
    except Unsupported as error:
        print(f"{model}/{precision}: {name}: {error}", flush=True)
        return None
    return place


def once(options: argparse.Namespace, model: str, precision: str, threads: int, number: int) -> dict[str, Any]:
    """Seconds of every candidate, by round: TTFT, and the mean of the tokens after it."""
    import numpy as np

    from slimexport.bench import Settings
    from slimexport.environment import environment
    from slimexport.machine import huge_pages, rates
    from slimexport.verification import interleaved

    settings = Settings(prompts=LENGTHS, pasts=LENGTHS, rounds=options.rounds, threads=threads)
    rng = np.random.default_rng(number)
    names = candidates(options)
    names = [name for name in names if name == OURS or name.startswith("torch") == (number >= options.processes)]
    subjects: dict[str, Any] = {}
    for name in rng.permutation(names):
        if (place := place_of(options, model, precision, str(name))) is not None:
            subjects[str(name)] = CANDIDATES[name][1](place, str(name), settings, precision)
    vocabulary = min(subject.vocabulary for subject in subjects.values())
    huge_pages.ask()
    most = rates.measured(threads)
    samples = interleaved.measure(
        subjects,
        settings.quantities,
        lambda n: rng.integers(0, vocabulary, n),
        rounds=settings.rounds,
        threads=threads,
        warm_up=(1, 1),
    )
    known = environment()
    return {
        "busy": samples.busy,
        "opened": list(subjects),
        "seconds": {
            name: {
                **{f"prefill.ttft_ms.{n}": times for n, times in samples.ttft[name].items()},
                **{f"decode.tpot_ms.{n}": np.mean(runs, axis=1).tolist() for n, runs in samples.itl[name].items()},
            }
            for name in subjects
        },
        "streamed_bytes": {name: subject.streamed_bytes for name, subject in subjects.items()},
        "rates": dataclasses.asdict(most),
        "cpu": known["cpu"],
        "packages": known["packages"],
        **samples.watched,
    }


# ------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint(options: argparse.Namespace, model: str, precision: str) -> Path:
    """The Hugging Face directory that every candidate of a group is made from."""
    import slimexport
    from slimexport.artifacts import is_quantised, staged_directory
    from slimexport.config import RunConfig
    from slimexport.loading import load_model

    place: Path = options.work / "checkpoints" / (f"{model}-off-grid" if is_quantised(precision) else model)
    if place.is_dir():
        return place
    if model == "dense":
        loaded = load_model(RunConfig(model=options.model))
        found, tokenizer = loaded.model.float(), loaded.tokenizer
    else:
        pruned = options.work / "pruned"
        if not (pruned / "checkpoint").is_dir():
            slimexport.prune(RunConfig(model=options.model, ratio=RATIO, fast=True, layout="uniform"), pruned)
        found, tokenizer = slimexport.load(pruned)
    if is_quantised(precision):
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
    from slimexport.targets.passes import PASSES

    ours(options, model, precision, place, builder="transformers", without=tuple(PASSES))


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


def as_it_comes(options: argparse.Namespace, model: str, precision: str, place: Path) -> None:
    if precision != "fp32":
        raise Unsupported("as it comes is how it is measured")
    other = place_of(options, model, precision, "openvino")
    if other is not None:
        place.symlink_to(other.resolve())


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
    "openvino, bfloat16": (as_it_comes, openvino.opened_as_it_comes),
    "llama.cpp": (gguf, in_llama_cpp),
}


# ------------------------------------------------------------------------------------------------------------- table


@dataclasses.dataclass(frozen=True)
class Cell:
    """Median milliseconds, and how many times as fast ours is, with a 95 % interval."""

    ms: float
    ratio: float
    low: float
    high: float


def cells(rows: list[dict[str, Any]], group: str) -> dict[str, dict[str, Cell]]:
    """By candidate and quantity. A ratio is the geometric mean over processes of the median over their rounds."""
    import numpy as np

    of = [row["seconds"] for row in rows if row["group"] == group]
    found: dict[str, dict[str, Cell]] = {}
    for name in (name for name in CANDIDATES if any(name in seconds for seconds in of)):
        found[name] = {}
        for quantity in QUANTITIES:
            pairs = [(s[name][quantity], s[OURS][quantity]) for s in of if name in s]
            logs = [np.log(np.divide(own, ours)) for own, ours in pairs]
            low, high = np.exp(np.percentile(_draws(logs), (2.5, 97.5)))
            ms = 1e3 * float(np.median(np.concatenate([own for own, _ in pairs])))
            ratio = float(np.exp(np.mean([np.median(each) for each in logs])))
            found[name][quantity] = Cell(ms, ratio, float(low), float(high))
    return found


def _draws(logs: list[Any]) -> Any:
    """DRAWS means over processes that are drawn anew, each of the median over rounds that are, too."""
    import numpy as np

    rng, count = np.random.default_rng(0), len(logs)
    total = np.zeros(DRAWS)
    for _ in range(count):
        medians = np.stack([np.median(rng.choice(of, (DRAWS, len(of))), axis=1) for of in logs])
        total += medians[rng.integers(0, count, DRAWS), np.arange(DRAWS)]
    return total / count


def render(rows: list[dict[str, Any]]) -> str:
    """One line a candidate of a group: its times, and in brackets how many times ours is as fast."""
    body = []
    for group in dict.fromkeys(row["group"] for row in rows):
        for name, of in cells(rows, group).items():
            body.append([group.replace("/", ", "), name, *(_cell(of[q], name) for q in QUANTITIES)])
    return table(["model, weights, threads", "candidate", *map(_short, QUANTITIES)], body)


def summary(rows: list[dict[str, Any]]) -> str:
    """One line a group: our times, how many times as fast as the best ONNX rival, and every rival that is faster."""
    body = []
    for group in dict.fromkeys(row["group"] for row in rows):
        of = cells(rows, group)
        line, faster = [], []
        for quantity in QUANTITIES:
            onnx = [of[name][quantity].ratio for name in ONNX if name in of]
            line.append(f"{of[OURS][quantity].ms:.1f} ({min(onnx):.2f})")
            faster += [
                f"{name} {1 / its[quantity].ratio:.2f} x ({_short(quantity)})"
                for name, its in of.items() if its[quantity].high < 1
            ]  # fmt: skip
        body.append([group.replace("/", ", "), *line, "; ".join(faster) or "none"])
    return table(["model, weights, threads", *map(_short, QUANTITIES), "faster than ours"], body)


def _short(quantity: str) -> str:
    """`decode.tpot_ms.128` -> `TPOT 128`."""
    _, name, length = quantity.split(".")
    return f"{name.removesuffix('_ms').upper()} {length}"


def _cell(cell: Cell, name: str) -> str:
    return f"{cell.ms:.1f}" + ("" if name == OURS else f" ({cell.ratio:.2f}, {cell.low:.2f}-{cell.high:.2f})")


if __name__ == "__main__":
    main()
