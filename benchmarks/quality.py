"""Token perplexity of pruned models, in ONNX Runtime and in torch, beside the dense model; no training.

    python benchmarks/quality.py --calibration CALIBRATION.txt --eval-text EVALUATION.txt --work /tmp/quality

The protocol of the table in the README: 128 x 512 tokens of calibration text, the first 60,000 tokens of the evaluation
text in windows of 512 without overlap. Every row is a whole `slimexport run`: pruned, exported, measured on the graph.
Rows that are in the JSON already are not measured again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, load_rows, save_rows, table

import slimexport


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval-text", required=True)
    parser.add_argument("--work", type=Path, required=True, help="run directories are kept here")
    parser.add_argument("--ratios", default="0.2,0.3,0.5")
    parser.add_argument("--layouts", default="per_layer,uniform")
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--eval-tokens", type=int, default=60000)
    parser.add_argument("--threads", type=int, help="of torch and ONNX Runtime; default: all cores")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = load_rows(options.out)
    for ratio in map(float, options.ratios.split(",")):
        for layout in options.layouts.split(","):
            wanted = {"model": options.model, "ratio": ratio, "layout": layout}
            if any(all(row[k] == v for k, v in wanted.items()) for row in rows):
                continue
            rows.append({**wanted, **measure(options, ratio, layout)})
            save_rows(options.out, rows)
    print(render(rows))


def measure(options: argparse.Namespace, ratio: float, layout: str) -> dict[str, Any]:
    from slimexport.calibration import evaluation_ids
    from slimexport.verification.perplexity import torch_perplexity

    config = slimexport.RunConfig(
        model=options.model,
        ratio=ratio,
        layout=layout,  # type: ignore[arg-type]
        calibration=options.calibration,
        calibration_tokens=options.calibration_tokens,
        eval_text=options.eval_text,
        eval_tokens=options.eval_tokens,
        latency_runs=0,
        baseline_cache=options.work / "baselines",
        threads=options.threads,
    )
    place = options.work / f"{layout}-{ratio:g}"
    report = slimexport.run(
        config, place, force=not place.exists(), resume=place.exists(), progress=slimexport.Progress()
    )
    model, tokenizer = slimexport.load(place)
    in_torch = torch_perplexity(model, evaluation_ids(config, tokenizer, None).input_ids, config.eval_window)
    figures = {f.name: f for f in report.verification.figures}
    perplexity = figures["accuracy.perplexity"]
    return {
        "reached": report.plan.ratio,
        "allocation": report.plan.allocation,
        "perplexity": perplexity.shrunk,
        "perplexity_torch": in_torch,
        "perplexity_dense": perplexity.baseline,
        "perplexity_ratio": perplexity.ratio,
        "perplexity_ratio_interval": [perplexity.ratio_low, perplexity.ratio_high],
        "kl": figures["accuracy.kl"].shrunk,
        "top1_agreement": figures["accuracy.top1_agreement"].shrunk,
        "parameters": report.plan.estimates.parameters,
        "parameters_dense": report.plan.dense_estimates.parameters,
        "size_mb": figures["size.export_mb"].shrunk,
        "calibration": text(report.calibration),
        "evaluation": text(report.evaluation),
        "seconds": report.seconds,
        "pruning": {
            "seconds_forward": report.pruning.seconds_forward,
            "seconds_hessian": report.pruning.seconds_hessian,
            "seconds_selection": report.pruning.seconds_selection,
            "peak_memory_bytes": report.pruning.peak_memory_bytes,
        }
        if report.pruning
        else None,
    }


def text(source: Any) -> dict[str, Any] | None:
    """A text without the path of this machine: its sha256 says which it is."""
    return {**source.__dict__, "name": Path(source.name).name} if source else None


def render(rows: list[dict[str, Any]]) -> str:
    """The table of the README."""
    head = [
        "ratio",
        "layout",
        "allocation",
        "parameters",
        "perplexity (ONNX)",
        "perplexity (torch)",
        "x dense",
        "KL",
        "same top-1",
    ]
    body = [
        [
            f"{row['ratio']:.0%}", row["layout"], row["allocation"], f"{row['parameters'] / 1e6:.1f} M",
            f"{row['perplexity']:.2f}", f"{row['perplexity_torch']:.2f}", f"{row['perplexity_ratio']:.2f}",
            f"{row['kl']:.3f}", f"{row['top1_agreement']:.1%}",
        ]
        for row in sorted(rows, key=lambda r: (r["ratio"], r["layout"]))
    ]  # fmt: skip
    dense = rows[0]
    body.insert(
        0,
        [
            "dense",
            "–",
            "–",
            f"{dense['parameters_dense'] / 1e6:.1f} M",
            f"{dense['perplexity_dense']:.2f}",
            "–",
            "1",
            "0",
            "100%",
        ],
    )
    return table(head, body)


if __name__ == "__main__":
    main()
