"""Which numbers of channels do the kernels like? An FFN of SmolLM2's width with 1024 + u channels, u from 1 to 64.

    python benchmarks/rounding.py [--threads 1] [--rounds 20]
    python benchmarks/rounding.py --render

Both 1024 and 1088 are multiples of all that kernels pack by. A number between them should take the time between theirs;
what it takes over that is the price of not rounding to the next `u`. A stack of FFNs with weights of their own, larger
than the caches, as in a decoder; all sizes in turns in one process, and medians of paired ratios.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from common import RESULTS, load_rows, save_rows, table

HIDDEN, LOW, STEP, BLOCKS = 576, 1024, 64, 16
UNITS = (1, 2, 4, 8, 16, 32)
PRECISIONS = ("fp32", "int8", "int4")
TOKENS = (1, 128)  # a decode step, a prefill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "rounding.json")
    parser.add_argument("--busy", action="store_true", help="keep rows of a busy machine, to try the script out")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    rows = load_rows(options.out)
    if not options.render:
        for precision in PRECISIONS:
            made = measure(precision, options.threads, options.rounds, options.busy)
            keys = {(row["precision"], row["threads"]) for row in made}
            rows = [row for row in rows if (row["precision"], row["threads"]) not in keys] + made
            save_rows(options.out, rows)
    print(render(rows))


def measure(precision: str, threads: int, rounds: int, busy: bool) -> list[dict[str, Any]]:
    """Rows of one precision; none where the machine had other work to do."""
    import numpy as np

    from slimexport.machine import huge_pages
    from slimexport.machine.watch import Watch
    from slimexport.verification.intervals import median

    sizes = [LOW, *(LOW + unit for unit in UNITS), LOW + STEP]
    sessions = {size: session(size, precision, threads) for size in sizes}
    huge_pages.ask()
    inputs = {tokens: np.random.default_rng(0).normal(size=(tokens, HIDDEN)).astype(np.float32) for tokens in TOKENS}
    seconds: dict[tuple[int, int], list[float]] = {(size, tokens): [] for size in sizes for tokens in TOKENS}
    with Watch(threads) as watch:
        for number in range(-3, rounds):  # three of warm-up
            for tokens, given in inputs.items():
                for size in sizes[:: 1 if number % 2 else -1]:
                    runs = 10 if tokens == 1 else 1
                    started = time.perf_counter()
                    for _ in range(runs):
                        sessions[size].run(None, {"x": given})
                    if number >= 0:
                        seconds[size, tokens].append((time.perf_counter() - started) / runs)
    if watch.busy and not busy:
        print(f"{precision}: {watch.busy}; not kept", flush=True)
        return []
    rows = []
    for tokens in TOKENS:
        ends = zip(seconds[LOW, tokens], seconds[LOW + STEP, tokens], strict=True)
        pairs = list(ends)
        for size in sizes[1:-1]:
            share = (size - LOW) / STEP
            excess = [own / (a + share * (b - a)) for own, (a, b) in zip(seconds[size, tokens], pairs, strict=True)]
            found = median(excess)
            rows.append({
                "precision": precision, "threads": threads, "tokens": tokens, "channels": size,
                "excess": found.value, "low": found.low, "high": found.high, "rounds": rounds, **watch.found,
            })  # fmt: skip
    return rows


def session(channels: int, precision: str, threads: int) -> Any:
    """x [t, HIDDEN] through BLOCKS FFNs with residual additions."""
    import numpy as np
    import onnx_ir as ir
    import onnxruntime

    from slimexport.targets import quantise

    rng = np.random.default_rng(0)
    x = ir.val("x", ir.DataType.FLOAT, ["t", HIDDEN])
    weights, nodes, stream = [], [], x

    def product(value: ir.Value, inputs: int, outputs: int) -> ir.Value:
        weight = rng.normal(scale=inputs**-0.5, size=(inputs, outputs)).astype(np.float32)
        weights.append(ir.val(f"w{len(weights)}", const_value=ir.tensor(weight, name=f"w{len(weights)}")))
        return add("MatMul", value, weights[-1])

    def add(kind: str, *values: ir.Value, domain: str = "") -> ir.Value:
        nodes.append(ir.node(kind, list(values), domain=domain, name=f"n{len(nodes)}"))
        nodes[-1].outputs[0].name = f"v{len(nodes)}"
        return nodes[-1].outputs[0]

    for _ in range(BLOCKS):
        gate, up = product(stream, HIDDEN, channels), product(stream, HIDDEN, channels)
        made = product(add("Mul", add("QuickGelu", gate, domain="com.microsoft"), up), channels, HIDDEN)
        stream = add("Add", stream, made)
    stream.name, stream.type = "logits", ir.TensorType(ir.DataType.FLOAT)  # the name that quantise() looks for
    graph = ir.Graph([x], [stream], nodes=nodes, initializers=weights, opset_imports={"": 21, "com.microsoft": 1})
    graph.name = "ffn"
    model = ir.Model(graph, ir_version=10)
    if precision != "fp32":
        quantise.quantise(model, quantise.SCHEMES[precision])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def render(rows: list[dict[str, Any]]) -> str:
    """One line a precision and number of tokens: time over that of the line between 1024 and 1088 channels."""
    body = []
    for key in dict.fromkeys((row["precision"], row["threads"], row["tokens"]) for row in rows):
        of = {row["channels"]: row for row in rows if (row["precision"], row["threads"], row["tokens"]) == key}
        cells = [f"{of[LOW + u]['excess']:.2f} ({of[LOW + u]['low']:.2f}-{of[LOW + u]['high']:.2f})" for u in UNITS]
        body.append([key[0], str(key[1]), str(key[2]), *cells])
    return table(["precision", "threads", "tokens", *(f"1024 + {unit}" for unit in UNITS)], body)


if __name__ == "__main__":
    main()
