"""Whether training takes the memory that was counted for it, and keeps a limit.

    python benchmarks/recovery_memory.py RUN_DIRECTORY [--only distill]
    python benchmarks/recovery_memory.py --render

RUN_DIRECTORY is what `slimexport prune` wrote. Each row is `slimexport recover` of a copy of it, two steps in a process
of its own, with --max-memory at what was counted; the most it had resident (VmRSS of /proc, fifty times a second; all
libraries and mapped files in it). Linux.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, load_rows, save_rows, table
from scale import watched

from slimexport.artifacts import PruningPlan, from_dict, read_json
from slimexport.checkpoint import load
from slimexport.config import RunConfig
from slimexport.loading import load_model
from slimexport.recovery.memory import needs
from slimexport.recovery.methods import registry as methods
from slimexport.run_directory import CHECKPOINT, PLAN, PRUNE, RUN
from slimexport.stages.recover import recipe_of

TEXT = "news"
SETTINGS = (("distill", 256), ("distill", 512), ("distill", 1024), ("lora", 256), ("local", 256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--only", help="methods, joined by commas")
    parser.add_argument("--out", type=Path, default=RESULTS / "recovery_memory.json")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    rows = load_rows(options.out)
    if not options.render:
        for method, length in SETTINGS:
            if not options.only or method in options.only.split(","):
                rows = [row for row in rows if (row["method"], row["length"]) != (method, length)]
                rows.append(measured(options.directory, method, length))
                save_rows(options.out, rows)
    print(render(rows))


def measured(directory: Path, method: str, length: int) -> dict[str, Any]:
    settings = read_json(directory / RUN)["config"]
    steps = len(from_dict(PruningPlan, read_json(directory / PLAN), PLAN).blocks) if method == "local" else 2
    config = RunConfig.model_validate(
        settings | {"recover": method, "recover_length": length, "recover_budget": f"{steps} steps"}
    )
    recipe, host = counted(directory, config)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "run"
        copy.mkdir()
        for name in (RUN, PLAN, PRUNE):
            shutil.copy(directory / name, copy)
        shutil.copytree(directory / CHECKPOINT, copy / CHECKPOINT)
        took = watched(
            [sys.executable, "-m", "slimexport", "recover", str(copy), "--recover", method, "--recover-text", TEXT,
             "--recover-length", str(length), "--recover-budget", config.recover_budget, "--max-memory", str(host)]
        )  # fmt: skip
        parameters = sum(t.numel() for t in load(copy)[0].parameters())
    return {
        "method": method, "length": length, "together": recipe.together, "steps": steps, "parameters": parameters,
        "counted_bytes": host, "resident_bytes": took["resident"], "anonymous_bytes": took["anonymous"],
        "mapped_bytes": took["mapped"], "seconds": round(took["seconds"], 1),
    }  # fmt: skip


def counted(directory: Path, config: RunConfig) -> tuple[Any, int]:
    teacher = load_model(config)
    plan = from_dict(PruningPlan, read_json(directory / PLAN), PLAN)
    architecture, method = teacher.architecture.with_blocks(plan.blocks), methods.get(config.recover)
    student = method.prepare(load(directory)[0].float(), architecture, config)
    device = torch.device("cpu")
    recipe = recipe_of(config, device, method)
    found = needs(
        student, teacher.model, architecture, recipe, config.recover_length, device, one_by_one=method.one_by_one
    )
    return recipe, found.host


def render(rows: list[dict[str, Any]]) -> str:
    head = ["trained by", "tokens of a sequence", "at once", "parameters", "counted (GB)", "resident (GB)", "of it"]
    body = [
        [
            row["method"], str(row["length"]), str(row["together"]), f"{row['parameters'] / 1e6:.0f} M",
            f"{row['counted_bytes'] / 1e9:.2f}", f"{row['resident_bytes'] / 1e9:.2f}",
            f"{row['resident_bytes'] / row['counted_bytes']:.0%}",
        ]
        for row in rows
    ]  # fmt: skip
    return table(head, body)


if __name__ == "__main__":
    main()
