"""What sharing brings: a sweep of four ratios beside four runs of their own, and the front that it found.

    python benchmarks/sweep_cost.py --work DIR [--ratios 0.1,0.2,0.3,0.4] [-- OPTIONS...]     # goes on where it stopped
    python benchmarks/sweep_cost.py --render                                                  # from the JSON alone

OPTIONS are those of `slimexport run`. Every run is a process of its own, the sweep is one; what is compared is seconds
of CPU, which other work on the machine does not change much, and wall clock beside it. Weights and graph of each of the
sweep's models must be, byte for byte, those of the single run.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, load_rows, save_rows, table

from slimexport.artifacts import read_json, sha256_file
from slimexport.sweep.points import run_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--ratios", default="0.1,0.2,0.3,0.4")
    parser.add_argument("--out", type=Path, default=RESULTS / "sweep.json")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("options", nargs="*", help="of `slimexport run`, after --")
    options = parser.parse_args()
    rows = load_rows(options.out)
    if not options.render:
        rows = measure(options, rows)
    print(render(rows))


def measure(options: argparse.Namespace, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    said = " ".join(options.options)
    rows = [row for row in rows if row["options"] == said]
    ratios = [float(text) for text in options.ratios.split(",")]
    whole = options.work / "sweep"

    def kept(kind: str, place: Path, words: Sequence[str], **more: Any) -> None:
        if any(row["kind"] == kind for row in rows):
            return
        shutil.rmtree(place, ignore_errors=True)
        took = timed([*words, options.model, "-o", str(place), *options.options])
        rows.append({"kind": kind, "options": said, **took, **more})
        save_rows(options.out, rows)

    kept("sweep", whole, ["sweep", "--ratios", options.ratios])
    for row in rows:
        if row["kind"] == "sweep" and "points" not in row:
            report = read_json(whole / "sweep-report.json")
            row.update(points=report["points"], fronts=report["fronts"])
            save_rows(options.out, rows)
    for ratio in ratios:
        alone = options.work / f"alone-{run_name(ratio)}"
        kept(f"run {ratio:g}", alone, ["run", "--ratio", f"{ratio:g}"])
        made, wanted = bytes_of(whole / run_name(ratio)), bytes_of(alone)
        if made != wanted or not made:
            raise SystemExit(f"{whole / run_name(ratio)} does not hold the bytes of {alone}")
    return rows


def bytes_of(run: Path) -> dict[str, str]:
    """SHA-256 of weights and graphs; the model card beside them also has times."""
    files = [*run.glob("checkpoint/*.safetensors"), *run.glob("onnx*/model.onnx*")]
    return {str(path.relative_to(run)): sha256_file(path) for path in files}


def timed(words: Sequence[str]) -> dict[str, float]:
    """Seconds of a `slimexport` process with its children. A gate that is lost is fine, another failure is not."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([sys.executable, "-m", "slimexport.cli", *words], env=dict(os.environ), check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 3):
        raise SystemExit(f"slimexport {' '.join(words)} ended with {done.returncode}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(cpu, 1)}


def cost(rows: list[dict[str, Any]]) -> str:
    alone, shared = [row for row in rows if row["kind"] != "sweep"], [row for row in rows if row["kind"] == "sweep"]
    if not alone or not shared:
        return "not measured yet"
    share = {name: shared[0][name] / sum(row[name] for row in alone) for name in ("cpu_seconds", "wall_seconds")}
    return (
        f"The sweep took {shared[0]['cpu_seconds']:.0f} s of CPU; {len(alone)} runs of their own, which write the same "
        f"bytes, {sum(row['cpu_seconds'] for row in alone):.0f} s: {share['cpu_seconds']:.2f} "
        f"({share['wall_seconds']:.2f} of the wall clock)."
    )


def render(rows: list[dict[str, Any]]) -> str:
    """What it was asked for and what it cost, and its points: `on the front` where no other is smaller and better."""
    head = ["ratio", "graph", "MB", "x dense", "perplexity", "x dense", "KL", "on the front"]
    body = []
    for row in (row for row in rows if row["kind"] == "sweep"):
        best = row["fronts"]["size.export_mb"]
        for point in row["points"]:
            values, ratios = point["values"], point["ratios"]
            body.append([
                f"{point['ratio']:g}", point["export"],
                *(f"{of[name]:.{digits}f}" if name in of else "–" for name, of, digits in (
                    ("size.export_mb", values, 0), ("size.export_mb", ratios, 2), ("accuracy.perplexity", values, 2),
                    ("accuracy.perplexity", ratios, 2), ("accuracy.kl", values, 3))),
                "yes" if point["name"] in best else "",
            ])  # fmt: skip
    options = next((row["options"] for row in rows if row["kind"] == "sweep"), "")
    return f"With `{options}`. {cost(rows)}\n\n{table(head, body)}"


if __name__ == "__main__":
    main()
