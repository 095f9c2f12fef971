"""Size on disk, load time and peak memory of an exported graph.

Load time and memory are measured in a process of their own, `python -m slimexport.verification.footprint DIRECTORY`,
that holds Python, numpy, onnxruntime and the graph, and nothing of torch. It prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimexport.artifacts import Figure
from slimexport.environment import peak_memory_bytes
from slimexport.errors import SlimExportError
from slimexport.providers import PROVIDERS, parsed

PROMPT_TOKENS = 128
DECODE_TOKENS = 16
LOADS = 3  # processes per model, alternating

MB = 1e6

Progress = Callable[[int, int], None]


def export_bytes(directory: Path) -> int:
    """Bytes of the graph and its weights, model.onnx and the files named after it, of a GGUF file, or of a checkpoint's
    weights; not of tokenizer and configs beside them."""
    found = [
        path for pattern in ("model.onnx*", "model.gguf", "*.safetensors") for path in Path(directory).glob(pattern)
    ]
    return sum(path.stat().st_size for path in found if path.is_file())


def size_figure(shrunk: Path, baseline: Path | None) -> Figure:
    own, dense = export_bytes(shrunk), export_bytes(baseline) if baseline else None
    return Figure(
        "size.export_mb",
        "MB",
        shrunk=own / MB,
        baseline=dense / MB if dense else None,
        ratio=own / dense if dense else None,
        note="the graph and its weights, 1 MB = 1e6 bytes",
    )


def process_figures(
    shrunk: Path,
    baseline: Path | None,
    provider: str,
    threads: int,
    progress: Progress | None = None,
    provider_option: Sequence[str] = (),
) -> tuple[tuple[Figure, ...], dict[str, Any]]:
    """`load.seconds` and `memory.peak_rss_mb`, and what every process said.

    Models take turns, so the files are in the page cache for all but perhaps the first. Peak memory counts the pages
    of the weight file that onnxruntime maps, and the interpreter (`rss_before_mb` in the details).
    """
    from slimexport.verification.intervals import paired_figure

    places = {"shrunk": shrunk} if baseline is None else {"shrunk": shrunk, "baseline": baseline}
    found: dict[str, list[Mapping[str, Any]]] = {name: [] for name in places}
    failed: str | None = None
    for number in range(LOADS):
        for name in list(places)[:: 1 if number % 2 == 0 else -1]:
            said = _run(places[name], provider, threads, provider_option)
            failed = failed or said.get("failed")
            found[name].append(said)
            if progress:
                progress(sum(map(len, found.values())), LOADS * len(places))
    if failed:
        broken = Figure("load.seconds", "s", valid=False, note=failed)
        return (broken, replace(broken, name="memory.peak_rss_mb", unit="MB")), found
    seconds = {name: [float(said["load_seconds"]) for said in runs] for name, runs in found.items()}
    peak = {name: statistics.median(float(said["peak_rss_mb"]) for said in runs) for name, runs in found.items()}
    dense = peak.get("baseline")
    memory = Figure(
        "memory.peak_rss_mb",
        "MB",
        shrunk=peak["shrunk"],
        baseline=dense,
        ratio=peak["shrunk"] / dense if dense else None,
        note=f"whole process: load, prompt of {PROMPT_TOKENS}, {DECODE_TOKENS} tokens; median of {LOADS} processes",
    )
    load = paired_figure("load.seconds", "s", seconds["shrunk"], seconds.get("baseline"))
    if busy := next((said["busy"] for runs in found.values() for said in runs if said.get("busy")), None):
        load = replace(load, valid=False, note=busy)
    return (load, memory, *_device_figures(found)), found


def _device_figures(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[Figure, ...]:
    """None where no process held memory of a device."""
    held = {name: [said.get("device_memory_mb") for said in runs] for name, runs in found.items()}
    if any(value is None for values in held.values() for value in values):
        return ()
    medians = {name: statistics.median(map(float, filter(None, values))) for name, values in held.items()}
    own, dense = medians["shrunk"], medians.get("baseline")
    return (
        Figure(
            "memory.device_mb", "MB", shrunk=own, baseline=dense, ratio=own / dense if dense else None,
            note="GPU memory of the whole process, CUDA's own with it, after the same work as memory.peak_rss_mb",
        ),
    )  # fmt: skip


def _run(directory: Path, provider: str, threads: int, provider_option: Sequence[str] = ()) -> Mapping[str, Any]:
    """What the measuring process printed, or {"failed": why}."""
    import slimexport

    # -P keeps the current directory (a user's json.py, say) off the path; the package itself must stay on it.
    home = str(Path(slimexport.__file__).parent.parent)
    path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-m", __name__, str(directory), "--provider", provider, "--threads", str(threads)]
    command += [word for option in provider_option for word in ("--provider-option", option)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return said
    if done.returncode < 0:
        why = f"was killed by {signal.Signals(-done.returncode).name}"
        if done.returncode == -signal.SIGKILL:
            why += " (out of memory?)"
    else:
        why = f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:300]}"
    return {"failed": f"the measuring process {why}"}


def measure(directory: Path, provider: str, threads: int, provider_option: Sequence[str] = ()) -> dict[str, Any]:
    """Loads the graph and generates a little, in this process, which should have done nothing else before."""
    import numpy as np
    import onnxruntime  # noqa: F401  (not part of the load time)

    from slimexport.machine.watch import Watch
    from slimexport.runtime import open_decoder

    before = _memory_mb()
    with Watch(1) as watch:
        decoder = open_decoder(directory, provider, threads, parsed(provider_option))
    loaded = _memory_mb()
    positions = decoder.max_positions or PROMPT_TOKENS + DECODE_TOKENS
    tokens = max(1, min(PROMPT_TOKENS, positions - DECODE_TOKENS))
    prompt = np.arange(tokens) % (decoder.vocab_size or tokens)
    decoder.greedy(prompt, min(DECODE_TOKENS, positions - tokens + 1))
    device = device_memory_mb() if PROVIDERS[provider].device == "cuda" else None
    return {
        "load_seconds": round(decoder.load_seconds, 4),
        "busy": watch.busy,
        "device_memory_mb": device,
        "rss_before_mb": round(before, 1),
        "rss_loaded_mb": round(loaded, 1),
        "peak_rss_mb": round(peak_memory_bytes() / MB, 1),
        "prompt_tokens": tokens,
        "decode_tokens": DECODE_TOKENS,
        "torch_loaded": "torch" in sys.modules,
    }


def device_memory_mb() -> float | None:
    """What this process holds of its GPUs' memory, as nvidia-smi tells; None where it does not."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout  # fmt: skip
        held = [line.split(",") for line in said.splitlines() if line.strip()]
        own = [float(memory) for pid, memory in held if int(pid) == os.getpid()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return sum(own) * 2**20 / MB if own else None  # it counts in MiB


def _memory_mb() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss) / MB


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slimexport.verification.footprint", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--provider-option", action="append", default=[])
    options = parser.parse_args(arguments)
    try:
        made = measure(options.directory, options.provider, options.threads, options.provider_option)
        print(json.dumps(made))
    except SlimExportError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
