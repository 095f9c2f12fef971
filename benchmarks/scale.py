"""What a model of true size takes: peak memory and time of the prune stage, on random weights of its shape.

    python benchmarks/scale.py --work DIR [--shape llama-1.1b] [--blocks 4,8,16] [--tokens 16384]    # resumable
    python benchmarks/scale.py --work DIR --blocks 4 --tokens 8192 --ranks 1,2 --threads 1           # several processes
    python benchmarks/scale.py --floor                                                               # on GPUs, on paper
    python benchmarks/scale.py --render                                                              # from the JSON

Each row is `slimexport prune --fast` in a process of its own: how much memory it has of its own (RssAnon of /proc) and
how much of files it has mapped (RssFile), both above what the interpreter has with all libraries loaded, watched all
the time; and the seconds of every part from its trace. The model is made before and removed after. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, load_rows, save_rows, table

from slimexport.artifacts import read_json
from slimexport.pruning.memory import LIBRARIES_BYTES
from slimexport.streaming.files import Wanted, write_tensors

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1.1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4,
        "vocab_size": 32000, "num_hidden_layers": 22,
    },
    "llama-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 32000, "num_hidden_layers": 32,
    },
}  # fmt: skip
LENGTH = 512
# By NVIDIA's data sheets: dense FLOP/s in units of 1e12, in bfloat16 (tensor cores) and in float32 without them: TF32
# has too few digits for H; GB/s that a GPU can send to others in its machine (NVLink, one direction), and to those in
# other machines (its own port of a DGX). https://www.nvidia.com/en-us/data-center/a100/ (and h100, h200)
GPUS = {"A100": (312.0, 19.5, 300.0, 25.0), "H100 or H200 (SXM)": (989.0, 67.0, 450.0, 50.0)}
IN_A_MACHINE = 8
PAPER_TOKENS, PAPER_LENGTH = 128 * 2048, 2048
# What `slimexport prune` imports before it reads a weight.
LIBRARIES = "import slimexport.cli, slimexport.pruning.stage, slimexport.checkpoint.save, transformers, accelerate"
LLAMA = "from transformers.models.llama import modeling_llama"
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1.1b")
    parser.add_argument("--blocks", default="4,8,16", help="numbers of blocks, one run for each")
    parser.add_argument("--tokens", default="16384")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--ranks", default="1", help="processes that share the calibration set")
    parser.add_argument("--threads", type=int, help="of each process; default: all cores")
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--floor", action="store_true", help="counted from the shape, for the paper's calibration set")
    options, more = parser.parse_known_args()
    if options.floor:
        shape = "llama-7b"
        save_rows(RESULTS / "scale_floor.json", [floor(shape, gpu) for gpu in GPUS])
        print(render_floor(load_rows(RESULTS / "scale_floor.json")))
        return
    rows = load_rows(options.out)
    if not options.render:
        for blocks in map(int, options.blocks.split(",")):
            for tokens in map(int, options.tokens.split(",")):
                for ranks in map(int, options.ranks.split(",")):
                    key = {"shape": options.shape, "blocks": blocks, "tokens": tokens, "dtype": options.dtype,
                           "ranks": ranks, "threads": options.threads, "options": " ".join(more)}  # fmt: skip
                    if not any({name: row.get(name) for name in key} == key for row in rows):
                        rows.append({**key, **measured(options.work, key, more)})
                        save_rows(options.out, rows)
    print(render(rows))


def measured(work: Path, key: Mapping[str, Any], more: list[str]) -> dict[str, Any]:
    place, out, text = work / "model", work / "out", work / "text.txt"
    for path in (place, out):
        shutil.rmtree(path, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    try:
        make(place, SHAPES[key["shape"]] | {"num_hidden_layers": key["blocks"]}, getattr(torch, key["dtype"]))
        numbers = torch.randint(200, (key["tokens"] + 2 * LENGTH,), generator=torch.Generator().manual_seed(0))
        text.write_text(" ".join(f"w{number}" for number in numbers.tolist()))
        floor = watched([sys.executable, "-c", f"{LIBRARIES}\n{LLAMA}"])
        words = [str(place), "--ratio", "0.25", "--fast", "--calibration", str(text),
                 "--calibration-tokens", str(key["tokens"]), "--sequence-length", str(LENGTH), *more]  # fmt: skip
        if key["threads"]:
            os.environ["OMP_NUM_THREADS"] = str(key["threads"])
        planned = subprocess.run(
            [sys.executable, "-m", "slimexport", "plan", *words, "--json"], stdout=subprocess.PIPE, check=True
        )
        cost = json.loads(planned.stdout)["cost"]
        several = ["-m", "torch.distributed.run", "--nproc-per-node", str(key["ranks"])] if key["ranks"] > 1 else []
        took = watched([sys.executable, *several, "-m", "slimexport", "prune", *words, "-o", str(out)])
        trace = read_json(out / "prune.json")["trace"]
        files = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    finally:
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    parts = {name: sum(block[f"seconds_{name}"] for block in trace)
             for name in ("forward", "hessian", "selection", "fit")}  # fmt: skip
    return {
        "checkpoint_bytes": files,
        "anonymous_bytes": took["anonymous"] - floor["anonymous"],
        "mapped_bytes": took["mapped"] - floor["mapped"],
        "libraries_bytes": floor["anonymous"],
        "planned_bytes": cost["peak_memory_bytes"] - LIBRARIES_BYTES,
        "planned_seconds": cost["seconds"],
        "factorised": sorted({block["factorised"] for block in trace}),
        "wall_seconds": round(took["seconds"], 1),
        "seconds": {name: round(value, 2) for name, value in parts.items()},
    }


def floor(shape: str, gpu: str) -> dict[str, Any]:
    """Seconds that the counted operations take at the rates of the data sheet, and the memory that `plan` asks for."""
    from transformers import LlamaConfig

    from slimexport.architectures import architecture_of
    from slimexport.config import RunConfig
    from slimexport.pruning.cost import counted
    from slimexport.pruning.memory import needs
    from slimexport.pruning.planner import make_plan

    architecture = architecture_of(LlamaConfig(**SHAPES[shape], tie_word_embeddings=False), shape)
    plan = make_plan(architecture, ratio=0.25, criterion="slimgpt", allocation="incremental", layout="per_layer",
                     round_to=32, stored_dtype="bfloat16")  # fmt: skip
    work = counted(plan, architecture, PAPER_TOKENS, PAPER_LENGTH)
    config = RunConfig(model=shape, fast=True, calibration_tokens=PAPER_TOKENS, sequence_length=PAPER_LENGTH)
    half, single, near, far = (rate * 1e12 for rate in GPUS[gpu])
    # H of every block in float64 once around a ring, and the matrices that the first rank tells, float32 where so wide.
    summed = 8 * sum(sum(n**2 for n in (b.query_heads * architecture.head_dim, b.channels)) for b in plan.dense)
    told = 4 * architecture.hidden * sum(b.query_heads * architecture.head_dim + b.channels for b in plan.blocks)
    shared, alone = work.passes / half + work.moments / single, work.solves / single

    def of(ranks: int) -> float:
        speed = (near if ranks <= IN_A_MACHINE else far) / 1e3
        return shared / ranks + alone + (2 * summed + told) / speed

    places = {place: needs(plan, architecture, config, torch.device("cuda"), place, streamed=True)
              for place in ("device", "host", "file")}  # fmt: skip
    return {
        "shape": shape,
        "gpu": gpu,
        "tokens": PAPER_TOKENS,
        "flops": {"forward": work.passes, "hessian": work.moments, "selection": work.solves},
        "seconds": {
            "forward": work.passes / half, "hessian": work.moments / single, "selection": work.solves / single,
        },
        "moved_bytes": 2 * summed + told,
        "seconds_of_ranks": {str(ranks): of(ranks) for ranks in (8, 64)},
        "device_bytes": {place: found.device for place, found in places.items()},
        "host_bytes": {place: found.host for place, found in places.items()},
    }  # fmt: skip


def make(place: Path, sizes: Mapping[str, Any], dtype: torch.dtype) -> None:
    """A Llama of these sizes with random weights, one block in memory at a time."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, LlamaConfig

    from slimexport.testing.models import tiny_tokenizer

    config = LlamaConfig(**sizes, tie_word_embeddings=False, max_position_embeddings=2048, dtype=dtype)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    wanted = {name: Wanted(dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[Mapping[str, torch.Tensor]]:
        for name, want in wanted.items():
            made = torch.randn(want.shape, generator=generator) * 0.02
            yield {name: (made + 1 if name.endswith("norm.weight") else made).to(dtype)}

    write_tensors(place, wanted, batches())


def watched(command: list[str]) -> dict[str, float]:
    """Runs `command`; the largest memory of its own, of mapped files, and of both together that it had (bytes), and
    seconds."""
    started = time.monotonic()
    peak = {"anonymous": 0, "mapped": 0, "resident": 0}
    with subprocess.Popen(command) as process:

        def watch() -> None:
            while process.poll() is None:
                for name, value in _memory(process.pid).items():
                    peak[name] = max(peak[name], value)
                time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.wait()
        watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {**peak, "seconds": time.monotonic() - started}


def _memory(pid: int) -> dict[str, int]:
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return {
            name: int(lines[key].split()[0]) * 1024
            for name, key in (("anonymous", "RssAnon"), ("mapped", "RssFile"), ("resident", "VmRSS"))
        }
    except (OSError, KeyError, ValueError):  # it has just ended
        return {}


def render(rows: list[dict[str, Any]]) -> str:
    head = ["shape", "blocks", "tokens", "ranks x threads", "checkpoint (GB)", "memory (GiB)", "planned",
            "mapped (MiB)", "time (s)", "planned", "forward", "H", "selection"]  # fmt: skip
    body = []
    for row in rows:
        parts = row["seconds"]
        whole = sum(parts.values())
        one = row["ranks"] == 1
        body.append([
            ", ".join(filter(None, (row["shape"], row["dtype"], row["options"]))),
            str(row["blocks"]), str(row["tokens"]),
            f"{row['ranks']} x {row['threads'] or 'all'}", f"{row['checkpoint_bytes'] / 1e9:.2f}",
            f"{row['anonymous_bytes'] / 2**30:.2f}" if one else "–", f"{row['planned_bytes'] / 2**30:.2f}",
            f"{row['mapped_bytes'] / MIB:.0f}" if one else "–", f"{row['wall_seconds']:.0f}",
            f"{row['planned_seconds']:.0f}" if one else "–", f"{parts['forward']:.0f}", f"{parts['hessian']:.0f}",
            f"{parts['selection']:.0f} ({parts['selection'] / whole:.1%})",
        ])  # fmt: skip
    return table(head, body)


def render_floor(rows: list[dict[str, Any]]) -> str:
    head = ["shape", "tokens", "GPU", "forward (s)", "H (s)", "selection (s)", "together", "8 GPUs", "64 GPUs",
            "device memory (GiB)", "with states on the host"]  # fmt: skip
    body = [
        [
            f"{row['shape']}, bfloat16", str(row["tokens"]), row["gpu"],
            *(f"{row['seconds'][part]:.1f}" for part in ("forward", "hessian", "selection")),
            f"{sum(row['seconds'].values()):.0f}", *(f"{s:.1f}" for s in row["seconds_of_ranks"].values()),
            *(f"{row['device_bytes'][place] / 2**30:.1f}" for place in ("device", "host")),
        ]
        for row in rows
    ]  # fmt: skip
    return table(head, body)


if __name__ == "__main__":
    main()
