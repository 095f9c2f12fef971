"""Whether a graph answers a task's questions as the checkpoint does in torch: lm-eval asks both, through one class.

    python benchmarks/task_agreement.py RUN --task arc_easy=FILE     # a finished run directory; minutes a model
    python benchmarks/task_agreement.py --render                     # from the JSON alone

A question is scored alike where the graph and torch get it right together or wrong together, in every metric. Why one
that is not: the gap between the two best choices, in nats, of which rounding decides where it is as small as that.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, load_rows, save_rows, table

from slimexport.artifacts import from_dict, read_json
from slimexport.run_directory import PLAN, VERIFICATION, VerifyRecord

BAR = 0.995
# Accuracy and times were measured before, or are wanted by nobody here.
QUICK = ("--latency-runs", "0", "--eval-tokens", "2048", "--continuations", "0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--task", default="arc_easy")
    parser.add_argument("--out", type=Path, default=RESULTS / "task_agreement.json")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if not options.render:
        words = ["verify", str(options.run), "--tasks", options.task, *QUICK]
        subprocess.run([sys.executable, "-m", "slimexport.cli", *words], check=True)
        save_rows(options.out, rows_of(options.run, options.task.partition("=")[0]))
    rows = load_rows(options.out)
    print(render(rows))
    if any(row["agreement"] < BAR for row in rows):
        raise SystemExit(f"a graph agrees with torch on less than {BAR:.1%} of the questions")


def rows_of(run: Path, task: str) -> list[dict[str, Any]]:
    """One for each exported graph of `run`."""
    found = from_dict(VerifyRecord, read_json(run / VERIFICATION), str(run))
    rows = []
    for name, report in {found.first: found.report, **found.others}.items():
        figures = {figure.name: figure for figure in report.figures}
        agreement, accuracy = figures[f"task.{task}.torch_agreement"], figures[f"task.{task}.acc"]
        rows.append({
            "ratio": read_json(run / PLAN)["ratio"], "graph": name, "task": task,
            "questions": len(report.tasks[task]["questions"]["shrunk"]["acc"]), "accuracy": accuracy.shrunk,
            "dense": accuracy.baseline, "agreement": agreement.shrunk, "note": agreement.note,
        })  # fmt: skip
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    head = [
        "task",
        "questions",
        "removed",
        "graph",
        "accuracy",
        "dense",
        "scored as in torch",
        "which are not, and why",
    ]
    return table(head, [
        [row["task"], str(row["questions"]), f"{row['ratio']:.0%}", row["graph"], f"{row['accuracy']:.1%}",
         f"{row['dense']:.1%}", f"{row['agreement']:.2%}", "; ".join(row["note"].split("; ")[1:]) or "–"]
        for row in rows
    ])  # fmt: skip


if __name__ == "__main__":
    main()
