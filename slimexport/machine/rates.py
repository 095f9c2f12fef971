"""What the machine can do at most."""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

_READ_BYTES = 256 * 2**20  # more than any cache
_GEMM = 1024
_REPEATS = 5


@dataclass(frozen=True)
class Rates:
    """The best of several tries: bytes/s read from memory, float32 FLOP/s of a large matrix product, with `threads`."""

    threads: int
    read_bytes_per_second: float
    flops_per_second: float


@functools.cache
def measured(threads: int) -> Rates:
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
