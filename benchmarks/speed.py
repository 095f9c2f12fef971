"""How much of the ideal speed-up a pruned model reaches in ONNX Runtime.

    python benchmarks/speed.py RUN_DIRECTORY [--runs 40]

RUN_DIRECTORY is what `slimexport run` wrote, with its baseline. Shrunk and dense graph run interleaved in one process;
every ratio is the median over pairs of runs that stood beside each other. The ideal is the ratio of streamed bytes for
decoding and of FLOPs for prefill. Close other work on the machine before you run this.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import RESULTS, load_rows, save_rows, table

import slimexport


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed.json")
    options = parser.parse_args()
    overrides = {"latency_runs": options.runs, "eval_text": "default", "eval_tokens": 2048}
    report = slimexport.verify(options.directory, overrides, progress=slimexport.Progress())
    rows = []
    for figure in report.figures:
        if figure.ideal is None or figure.name.startswith("decode.tokens"):
            continue
        row = {**figure.__dict__, "directory": options.directory.name}
        if figure.ratio:
            row |= {
                "speedup": 1 / figure.ratio,
                "ideal_speedup": 1 / figure.ideal,
                "share": figure.ideal / figure.ratio,
            }
        rows.append(row)
    kept = [r for r in load_rows(options.out) if r["directory"] != options.directory.name]
    save_rows(options.out, kept + rows)
    head = ["figure", "dense", "shrunk", "speed-up", "95 % interval", "ideal", "share of ideal"]
    body = [
        [r["name"], f"{r['baseline']:.2f} {r['unit']}", f"{r['shrunk']:.2f} {r['unit']}", f"{r['speedup']:.2f}",
         f"{1 / r['ratio_high']:.2f}-{1 / r['ratio_low']:.2f}", f"{r['ideal_speedup']:.2f}", f"{r['share']:.0%}"]
        if r["valid"] and r["ratio"]
        else [r["name"], f"invalid: {r['note']}", "", "", "", "", ""]
        for r in rows
    ]  # fmt: skip
    print(table(head, body))


if __name__ == "__main__":
    main()
