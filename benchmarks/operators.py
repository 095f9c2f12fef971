"""Where a token's time goes: ONNX Runtime's own profile of decoding, by operator and weight, beside the read floor.

    python benchmarks/operators.py DIR... [--past 128] [--tokens 64] [--threads 1]     # DIR: exported directories
    python benchmarks/operators.py --render

The rows of one graph add up to the time in kernels; what a call takes besides (dispatch, binding, this process) is the
last row. The profiler itself costs a little, so that shares count rather than milliseconds. `x floor` is the time over
that of reading the operator's weights once at the measured rate.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from common import RESULTS, load_rows, save_rows, table

BETWEEN = "between kernels"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="*", type=Path)
    parser.add_argument("--past", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "operators.json")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    rows = load_rows(options.out)
    for directory in options.directories:
        made = profile(directory, options.past, options.tokens, options.threads)
        rows = [row for row in rows if row["graph"] != directory.name] + made
        save_rows(options.out, rows)
    print(render(rows))


def profile(directory: Path, past: int, tokens: int, threads: int) -> list[dict[str, Any]]:
    """Milliseconds a token of every kind of operator in the graph of `directory`, the longest first."""
    import numpy as np

    from slimexport.machine import huge_pages, rates

    rate = rates.measured(threads).read_bytes_per_second
    kinds = kinds_of(directory)
    with tempfile.TemporaryDirectory() as place:
        decoder = _profiled(directory, threads, f"{place}/profile")
        huge_pages.ask()
        for _ in range(2):  # the first is the warm-up
            decoder.timed_greedy(np.arange(past), tokens)
        events = json.loads(Path(decoder._session.end_profiling()).read_text(encoding="utf-8"))
    runs = sorted(e["ts"] for e in events if e["name"] == "model_run")[-tokens:]
    whole = sum(e["dur"] for e in events if e["name"] == "model_run" and e["ts"] >= runs[0])
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        if event["name"].endswith("_kernel_time") and event["ts"] >= runs[0]:
            kind, _ = kinds.get(event["name"].removesuffix("_kernel_time"), (event["args"]["op_name"], 0))
            spent[kind] += event["dur"]
    spent[BETWEEN] = whole - sum(spent.values())
    size: dict[str, int] = defaultdict(int)
    for kind, read in kinds.values():
        size[kind] += read
    common = {"graph": directory.name, "past": past, "threads": threads, "read_bytes_per_second": rate}
    return [
        {**common, "kind": kind, "ms": us / 1e3 / tokens, "bytes": size[kind]}
        for kind, us in sorted(spent.items(), key=lambda item: (item[0] == BETWEEN, -item[1]))
    ]


def _profiled(directory: Path, threads: int, prefix: str) -> Any:
    """A decoder whose session writes a profile. Options of a session are the runtime's own business elsewhere."""
    import onnxruntime

    from slimexport.runtime import OnnxDecoder

    plain = onnxruntime.SessionOptions

    def profiling() -> Any:
        options = plain()
        options.enable_profiling, options.profile_file_prefix = True, prefix
        return options

    onnxruntime.SessionOptions = profiling
    try:
        return OnnxDecoder(directory, threads=threads)
    finally:
        onnxruntime.SessionOptions = plain


def kinds_of(directory: Path) -> dict[str, tuple[str, int]]:
    """Name of a node -> its kind (operator, and whose weights it multiplies with), bytes of weights that it reads."""
    import onnx_ir

    found = {}
    for node in onnx_ir.load(directory / "model.onnx").graph:
        if node.op_type in ("Gather", "GatherBlockQuantized", "GroupQueryAttention"):  # rows of tables
            found[str(node.name)] = (node.op_type, 0)
            continue
        weights = [_weight(value) for value in node.inputs if value is not None and _weight(value).const_value]
        named = _whose(str(weights[0].name)) if weights and len(weights[0].const_value.shape) > 1 else ""
        found[str(node.name)] = (f"{node.op_type} {named}".strip(), sum(w.const_value.nbytes for w in weights))
    return found


def _weight(value: Any) -> Any:
    """Through the transposition that ONNX Runtime takes into the product."""
    producer = value.producer()
    return producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else value


def _whose(weight: str) -> str:
    """`model.layers.3.mlp.up_proj.weight_t.codes` -> `up_proj`; of several in one, all of them."""
    parts = [part.split(".weight")[0].rpartition(".")[2] for part in weight.split("__") if ".weight" in part]
    return " + ".join(parts + ["the next"] * ("and_next" in weight))


def render(rows: list[dict[str, Any]]) -> str:
    """One line a kind of operator; those below 1 % of the graph's time are put together."""
    head, body = ["graph", "operator", "ms a token", "share", "x floor"], []
    for graph in dict.fromkeys(row["graph"] for row in rows):
        of = [row for row in rows if row["graph"] == graph]
        whole = sum(row["ms"] for row in of)
        large = [row for row in of if row["ms"] >= whole / 100 or row["kind"] == BETWEEN]
        small = sum(row["ms"] for row in of if row not in large)
        for row in large:
            floor = 1e3 * row["bytes"] / row["read_bytes_per_second"]
            times = f"{row['ms'] / floor:.2f}" if floor > whole / 1000 else "–"
            body.append([graph, row["kind"], f"{row['ms']:.2f}", f"{row['ms'] / whole:.1%}", times])
        body.append([graph, "all others", f"{small:.2f}", f"{small / whole:.1%}", "–"])
    return table(head, body)


if __name__ == "__main__":
    main()
