"""How much of the ideal speed-up a pruned model reaches in ONNX Runtime, in every precision of a run.

    python benchmarks/speed.py RUN_DIRECTORY [--runs 40] [--threads 2]
    python benchmarks/speed.py --render

RUN_DIRECTORY is what `slimexport run` wrote, with its baselines. Shrunk and dense graph run interleaved in one process;
every ratio is the median over pairs of runs that stood beside each other. The ideal is the ratio of streamed bytes for
decoding and of FLOPs for prefill. Close other work on the machine before you run this.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import RESULTS, load_rows, save_rows, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed.json")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    rows = load_rows(options.out)
    if not options.render:
        made = measure(options.directory, options.runs, options.threads)
        measured = {(row["precision"], row["threads"]) for row in made}
        rows = [row for row in rows if (row["precision"], row["threads"]) not in measured] + made
        save_rows(options.out, rows)
    print(render(rows))


def measure(directory: Path, runs: int, threads: int | None) -> list[dict[str, Any]]:
    """Rows of every export; figures that the machine was too busy for have no ratio."""
    import slimexport
    from slimexport.pipeline import verified

    overrides = {"latency_runs": runs, "eval_text": "default", "eval_tokens": 2048, "threads": threads}
    slimexport.verify(directory, overrides, progress=slimexport.Progress())
    rows = []
    for name, report in verified(directory).items():
        for figure in report.figures:
            if figure.ideal is None or not figure.name.startswith(("prefill.", "decode.tpot", "decode.itl")):
                continue
            precision = name.partition("-")[2] or "fp32"
            row = {**figure.__dict__, "precision": precision, "threads": report.latency["threads"], "runs": runs}
            if figure.ratio:
                row |= {
                    "speedup": 1 / figure.ratio,
                    "ideal_speedup": 1 / figure.ideal,
                    "share": figure.ideal / figure.ratio,
                }
            rows.append(row)
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    head = ["weights", "threads", "figure", "dense", "shrunk", "speed-up", "interval", "ideal", "share of the ideal"]
    body = []
    for r in rows:
        first = [r["precision"], str(r["threads"]), r["name"]]
        if not r["valid"] or not r["ratio"]:
            body.append([*first, f"invalid: {r['note']}", *[""] * 5])
            continue
        body.append([
            *first, f"{r['baseline']:.1f} {r['unit']}", f"{r['shrunk']:.1f} {r['unit']}", f"{r['speedup']:.2f}",
            f"{1 / r['ratio_high']:.2f}-{1 / r['ratio_low']:.2f}", f"{r['ideal_speedup']:.2f}", f"{r['share']:.0%}",
        ])  # fmt: skip
    return table(head, body)


if __name__ == "__main__":
    main()
