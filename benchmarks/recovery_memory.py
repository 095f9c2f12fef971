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
SETTINGS = (
    ("distill", "adamw", 256), ("distill", "adamw", 512), ("distill", "adamw", 1024), ("distill", "adamw-8bit", 256),
    ("lora", "adamw", 256), ("local", "adamw", 256),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--only", help="methods, joined by commas")
    parser.add_argument("--out", type=Path, default=RESULTS / "recovery_memory.json")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    rows = load_rows(options.out)
    if not options.render:
        for setting in SETTINGS:
            if not options.only or setting[0] in options.only.split(","):
                rows = [row for row in rows if (row["method"], row["optimizer"], row["length"]) != setting]
                rows.append(measured(options.directory, *setting))
                save_rows(options.out, rows)
    print(render(rows))


def measured(directory: Path, method: str, optimizer: str, length: int) -> dict[str, Any]:
    plan = from_dict(PruningPlan, read_json(directory / PLAN), PLAN)
    steps = len(plan.blocks) if method == "local" else 2
    asked = {
        "recover": method, "recover_length": length, "recover_budget": f"{steps} steps", "recover_optimizer": optimizer
    }  # fmt: skip
    config = RunConfig.model_validate(read_json(directory / RUN)["config"] | asked)
    student, _ = load(directory)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    together, host = counted(student, plan, config)
    del student  # its memory is not the measured process's, but the machine's
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "run"
        copy.mkdir()
        for name in (RUN, PLAN, PRUNE):
            shutil.copy(directory / name, copy)
        shutil.copytree(directory / CHECKPOINT, copy / CHECKPOINT)
        took = watched(
            [sys.executable, "-m", "slimexport", "recover", str(copy), "--recover", method, "--recover-text", TEXT,
             "--recover-length", str(length), "--recover-budget", config.recover_budget,
             "--recover-optimizer", optimizer, "--max-memory", str(host)]
        )  # fmt: skip
    return {
        "method": method, "optimizer": optimizer, "length": length, "together": together, "steps": steps,
        "parameters": parameters,
        "counted_bytes": host, "resident_bytes": took["resident"], "anonymous_bytes": took["anonymous"],
        "mapped_bytes": took["mapped"], "seconds": round(took["seconds"], 1),
    }  # fmt: skip


def counted(student: Any, plan: PruningPlan, config: RunConfig) -> tuple[int, int]:
    """Sequences in a forward pass, and bytes of the host."""
    teacher, method, device = load_model(config), methods.get(config.recover), torch.device("cpu")
    architecture = teacher.architecture.with_blocks(plan.blocks)
    recipe = recipe_of(config, device, method, architecture)
    model = method.prepare(student.float(), architecture, config)
    found = needs(
        model, teacher.model, architecture, recipe, config.recover_length, device, one_by_one=method.one_by_one
    )
    return recipe.together, found.host


def render(rows: list[dict[str, Any]]) -> str:
    head = [
        "trained by",
        "optimizer",
        "tokens of a sequence",
        "at once",
        "parameters",
        "counted (GB)",
        "resident (GB)",
        "of it",
    ]
    body = [
        [
            row["method"], row["optimizer"], str(row["length"]), str(row["together"]),
            f"{row['parameters'] / 1e6:.0f} M",
            f"{row['counted_bytes'] / 1e9:.2f}", f"{row['resident_bytes'] / 1e9:.2f}",
            f"{row['resident_bytes'] / row['counted_bytes']:.0%}",
        ]
        for row in rows
    ]  # fmt: skip
    return table(head, body)


if __name__ == "__main__":
    main()
