"""What pruning costs: forward, Hessian, selection and allocation, beside one dense forward pass over the same tokens.

    python benchmarks/cost.py [--model smollm2-135m] [--tokens 16384] [--shapes small,wide,wider]

Every line is measured in one process, the dense pass right before the pruning it is compared with. `selection` is
choosing, compensating and the re-fit; `fit` that of the up and gate projections; `allocation` what the sensitivities
cost. The shares are of all but allocation. The shapes are random Llamas of a few blocks: how the parts grow with width,
blocks and tokens does not depend on what the weights say.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, load_rows, save_rows, table

from slimexport.architectures import architecture_of
from slimexport.artifacts import CalibrationSet, ModelSource, TextSource
from slimexport.config import RunConfig
from slimexport.loading import LoadedModel, load_model
from slimexport.pruning.stage import curvature_of, measure_model, prune_model
from slimexport.stages.plan import plan_stage

LENGTH = 512
SHAPES = {  # hidden, FFN, query heads, KV heads, blocks
    "small": (576, 1536, 9, 3, 6),
    "small-12": (576, 1536, 9, 3, 12),
    "wide": (1024, 2816, 16, 4, 3),
    "wider": (2048, 5632, 32, 8, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="also a real model, whole")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default="8192,16384")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--modes", default="default,fast")
    parser.add_argument("--out", type=Path, default=RESULTS / "cost.json")
    options = parser.parse_args()
    rows = load_rows(options.out)
    names = [*([options.model] if options.model else []), *filter(None, options.shapes.split(","))]
    for name in names:
        loaded = random_model(name) if name in SHAPES else load_model(RunConfig(model=name))
        for tokens in map(int, options.tokens.split(",")):
            for mode in options.modes.split(","):
                key = {"model": name, "tokens": tokens, "mode": mode, "ratio": options.ratio}
                rows = [r for r in rows if any(r[k] != v for k, v in key.items())]
                rows.append({**key, **measure(loaded, tokens, mode, options.ratio)})
                save_rows(options.out, rows)
    print(render(rows))


def random_model(name: str) -> LoadedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, channels, heads, groups, blocks = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=hidden, intermediate_size=channels, num_attention_heads=heads,
        num_key_value_heads=groups, head_dim=hidden // heads, num_hidden_layers=blocks, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    source = ModelSource(name, "directory", ".", None, name, "float32")
    return LoadedModel(model, None, architecture_of(config, name), source)  # type: ignore[arg-type]


def measure(loaded: LoadedModel, tokens: int, mode: str, ratio: float) -> dict[str, Any]:
    ids = torch.randint(loaded.model.config.vocab_size, (tokens // LENGTH, LENGTH), generator=torch.manual_seed(1))
    calibration = CalibrationSet(ids, TextSource("random", tokens, "0" * 64), 0)
    config = RunConfig(model=loaded.source.name, ratio=ratio, calibration_tokens=tokens, fast=mode == "fast")
    decoder = loaded.model.get_decoder()
    with torch.inference_mode():
        decoder(ids[:1], use_cache=False)
        started = time.monotonic()
        for part in ids.split(8):
            decoder(part, use_cache=False)
    dense = time.monotonic() - started
    started = time.monotonic()
    curvature = curvature_of(loaded, calibration, config)
    weighing = time.monotonic() - started
    costs = None if mode == "fast" else measure_model(loaded, calibration, config, curvature=curvature)
    plan = plan_stage(config, loaded.architecture, "float32", costs)
    copied = replace(loaded, model=copy.deepcopy(loaded.model))
    made = prune_model(copied, plan, calibration, config, curvature=curvature)
    seconds = {
        "curvature": weighing,
        "allocation": costs.seconds if costs else 0.0,
        "forward": sum(t.seconds_forward for t in made.trace),
        "hessian": sum(t.seconds_hessian for t in made.trace),
        "selection": sum(t.seconds_selection for t in made.trace),
        "fit": sum(t.seconds_fit for t in made.trace),
    }
    pruning = sum(seconds.values()) - seconds["allocation"]
    return {
        "dense_forward": dense,
        "seconds": seconds,
        "dense_passes": (pruning + seconds["allocation"]) / dense,
        "selection_share": seconds["selection"] / pruning,
        "fit_share": seconds["fit"] / pruning,
    }


def render(rows: list[dict[str, Any]]) -> str:
    parts = ("curvature", "allocation", "forward", "hessian", "selection", "fit")
    head = ["model", "tokens", "mode", "dense pass, s", *(f"{p}, s" for p in parts), "dense passes", "selection", "fit"]
    body = [
        [
            row["model"], f"{row['tokens']:,}", row["mode"], f"{row['dense_forward']:.1f}",
            *(f"{row['seconds'][p]:.1f}" if p in row["seconds"] else "–" for p in parts), f"{row['dense_passes']:.1f}",
            f"{row['selection_share']:.0%}", f"{row['fit_share']:.0%}" if "fit_share" in row else "–",
        ]
        for row in rows
    ]  # fmt: skip
    return table(head, body)


if __name__ == "__main__":
    main()
