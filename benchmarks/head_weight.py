"""How the ratio is best divided between heads and channels: perplexity on development text over `--head-weight`.

    python benchmarks/head_weight.py --text CALIBRATION.txt [--ratio 0.3] [--weights 1,0.6,0.3]

Calibrated on windows of the first 59,904 tokens of the text, measured in torch on its last 7,600 and on 4,096 tokens of
the built-in evaluation articles: the evaluation text of the quality table is not touched.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from pathlib import Path

import torch
from common import RESULTS, load_rows, save_rows, table

from slimexport.artifacts import CalibrationSet, TextSource
from slimexport.calibration import evaluation_ids
from slimexport.config import RunConfig
from slimexport.loading import load_model
from slimexport.pruning.planner import make_plan
from slimexport.pruning.stage import prune_model
from slimexport.verification.perplexity import torch_perplexity

WINDOW, CALIBRATION, DEVELOPMENT = 512, 117 * 512, 7600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--weights", default="1,0.6,0.3")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--out", type=Path, default=RESULTS / "head_weight.json")
    options = parser.parse_args()
    config = RunConfig(model=options.model, fast=True)  # where head_weight counts
    loaded = load_model(config)
    ids = torch.tensor(loaded.tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids)
    windows = ids[:CALIBRATION].view(-1, WINDOW)
    chosen = windows[torch.linspace(0, len(windows) - 1, options.windows).long()]
    calibration = CalibrationSet(chosen, TextSource(str(options.text), chosen.numel(), ""), 0)
    texts = {
        "same kind": ids[-DEVELOPMENT:],
        "built-in": evaluation_ids(config, loaded.tokenizer, None).input_ids[:4096],
    }
    dense = {name: torch_perplexity(loaded.model, text, WINDOW) for name, text in texts.items()}
    rows = load_rows(options.out)
    for weight in map(float, options.weights.split(",")):
        plan = make_plan(
            loaded.architecture, ratio=options.ratio, criterion="slimgpt", allocation="incremental",
            layout="per_layer", head_weight=weight,
        )  # fmt: skip
        small = prune_model(replace(loaded, model=copy.deepcopy(loaded.model)), plan, calibration, config)
        found = {name: torch_perplexity(small.model, text, WINDOW) / dense[name] for name, text in texts.items()}
        key = {"ratio": options.ratio, "head_weight": weight, "windows": options.windows}
        rows = [r for r in rows if any(r[k] != v for k, v in key.items())]
        rows.append({**key, "x_dense": found})
        save_rows(options.out, rows)
    body = [
        [f"{r['ratio']:g}", f"{r['head_weight']:g}", *(f"{x:.3f}" for x in r["x_dense"].values())]
        for r in sorted(rows, key=lambda r: (r["ratio"], -r["head_weight"]))
    ]
    print(table(["ratio", "head weight", *(f"x dense, {name}" for name in texts)], body))


if __name__ == "__main__":
    main()
