"""What this machine can do at most, and whether it had anything else to do while it was measured."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Threads that work alone on their cores are on the CPU nearly all the time, also while they wait for each other. Below
# this share other work had the cores, and ratios are pressed toward 1 although they look steady.
MIN_CPU_SHARE = 0.75
MAX_STEAL = 0.05  # of all time: what the host of this virtual machine gave to others
_READ_BYTES = 256 * 2**20  # more than any cache
_GEMM = 1024
_REPEATS = 5


@dataclass(frozen=True)
class Rates:
    """The best of several tries: bytes/s read from memory, float32 FLOP/s of a large matrix product, with `threads`."""

    threads: int
    read_bytes_per_second: float
    flops_per_second: float


def rates(threads: int) -> Rates:
    return Rates(threads, read_rate(threads), gemm_rate(threads))


def read_rate(threads: int) -> float:
    """Bytes/s at which `threads` threads read memory once (numpy's maximum, which does next to nothing with it)."""
    data = np.ones(_READ_BYTES // 4, np.float32)
    parts = np.array_split(data, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_REPEATS):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - started)
    return data.nbytes / best


def gemm_rate(threads: int) -> float:
    """FLOP/s of ONNX Runtime's own float32 product of two square matrices."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((_GEMM, _GEMM), np.float32), "w")
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, [_GEMM, _GEMM])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [_GEMM, _GEMM])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "gemm", [shape], [out], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": np.ones((_GEMM, _GEMM), np.float32)}
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        session.run(None, feed)
        best = min(best, time.perf_counter() - started)
    return 2 * _GEMM**3 / best


class Watch:
    """Watches the machine while something is measured: `with Watch(threads) as watch: ...`, then `watch.busy`."""

    def __init__(self, threads: int):
        self.threads = threads
        self.found: dict[str, float] = {}

    def __enter__(self) -> Watch:
        self._wall, self._cpu, self._machine = time.perf_counter(), time.process_time(), _jiffies()
        return self

    def __exit__(self, *_: Any) -> None:
        wall = time.perf_counter() - self._wall
        self.found = {"cpu_share": round((time.process_time() - self._cpu) / wall / self.threads, 3)}
        before, after = self._machine, _jiffies()
        if before and after and (passed := sum(after) - sum(before)):
            self.found["steal"] = round((after[7] - before[7]) / passed, 4)
        if (load := _load()) is not None:
            self.found["load_average"] = load

    @property
    def busy(self) -> str | None:
        """Why nothing that was measured meanwhile counts; None where the machine was ours."""
        share, steal = self.found.get("cpu_share", 1.0), self.found.get("steal", 0.0)
        if share < MIN_CPU_SHARE:
            return f"the machine was busy: the runs had {share:.0%} of their {self.threads} cores"
        if steal > MAX_STEAL:
            return f"the machine was busy: its host gave {steal:.0%} of its time to others"
        return None


def _jiffies() -> list[int]:
    """Of all cores since the start: user, nice, system, idle, iowait, irq, softirq, steal, ..."""
    try:
        return [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return []


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
