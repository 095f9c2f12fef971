"""A made-up report with numbers of a likely size; nothing in it was measured."""

from __future__ import annotations

from typing import Any

from slimexport.artifacts import (
    BlockSizes,
    Estimates,
    ExportArtifact,
    Figure,
    ModelSource,
    PruningPlan,
    ShrunkCheckpoint,
    TextSource,
    VerificationReport,
)
from slimexport.config import RunConfig
from slimexport.gates.decide import evaluate
from slimexport.gates.declared import Gate
from slimexport.reporting import BlockSummary, PruningSummary, Report

BLOCKS = 30

FIGURES = (
    Figure("accuracy.perplexity", "perplexity", 30.1, 23.37, 1.288, note="16352 tokens scored, window and stride 512"),
    Figure("accuracy.kl", "nats", 0.241, 0.0),
    Figure("accuracy.top1_agreement", "share", 0.741, 1.0, 0.741, better="higher"),
    Figure("numerics.max_logit_difference", "", 1.9e-4, 1.1e-4),
    Figure("decode.tpot_ms", "ms", 12.31, 16.2, 0.76, 0.744, 0.777, 0.741),
    Figure("decode.tpot_ms.p90", "ms", 13.02, 17.0, 0.766),
    Figure("decode.tokens_per_s", "tokens/s", 81.2, 61.7, 1.316, better="higher"),
    Figure("prefill.ttft_ms.128", "ms", valid=False, note="spread 38 % of the median over 10 runs", ideal=0.75),
    Figure("prefill.ttft_ms.512", "ms", 402.0, 533.0, 0.754, 0.741, 0.768, 0.75),
    Figure("size.export_mb", "MB", 431.6, 538.1, 0.802),
    Figure("memory.peak_rss_mb", "MB", 812.0, None),
)


def plan() -> PruningPlan:
    kept = tuple(BlockSizes(3 if i < 8 else 2, 3, 1536 - 32 * (i * 18 // BLOCKS + 2)) for i in range(BLOCKS))
    return PruningPlan(
        model_type="llama",
        criterion="slimgpt",
        allocation="incremental",
        layout="per_layer",
        ratio_asked=0.25,
        ratio=0.2507,
        dense=tuple(BlockSizes(3, 3, 1536) for _ in range(BLOCKS)),
        blocks=kept,
        dense_estimates=Estimates(134_515_008, 106_168_320, 538_060_032, 538_000_000, 269_000_000, 46_080),
        estimates=Estimates(107_900_000, 79_550_000, 431_600_000, 431_500_000, 215_700_000, 35_000),
        notes=("channels re-balanced after the heads were rounded",),
    )


def report(gates: tuple[str, ...] = ("ratio(accuracy.perplexity)<=1.5", "speedup(decode.tpot_ms)>=1.2"),
           **changes: Any) -> Report:  # fmt: skip
    """A Report whose gates are really evaluated; `changes` replace its fields."""
    made = tuple(Gate.parse(gate) for gate in gates)
    verification = changes.pop("verification", VerificationReport(FIGURES, notes=("window 512, no overlap",)))
    blocks = tuple(BlockSummary(i, 0.031, 0.012, 0.094, 0.037, 1.7) for i in range(BLOCKS))
    config = RunConfig(model="smollm2-135m", ratio=0.25, gates=made).model_dump(mode="json")
    values: dict[str, Any] = {
        "source": ModelSource("smollm2-135m", "builtin", "/models/smollm2.gguf", None, "ab" * 32, "float32"),
        "config": config,
        "plan": plan(),
        "checkpoint": ShrunkCheckpoint("checkpoint", 107_900_000, 431_600_000, {"config.json": "cd" * 32}, 0.0),
        "verification": verification,
        "gates": evaluate(made, verification),
        "pruning": PruningSummary(blocks, 21.0, 14.2, 17.9, 1_900_000_000, 0.0, 33.0),
        "calibration": TextSource("English Wikipedia excerpt of gensim", 32768, "12" * 32, "CC BY-SA/GFDL"),
        "evaluation": TextSource("English Wikipedia excerpt, evaluation part", 16384, "34" * 32),
        "exports": {
            "onnx": ExportArtifact(
                "out/onnx", "onnx", "mobius", "fp32", "cpu", {"model.onnx": "ef" * 32}, ("input_ids",),
                ("logits",), (3, 2), 64, False,
            )
        },
        "environment": {
            "slimexport": "0.1.0", "python": "3.11.7", "platform": "Linux x86_64", "cpu": "Some CPU @ 2.4 GHz",
            "cores": 2, "packages": {"torch": "2.13.0+cpu", "onnxruntime": "1.31.1", "optimum": None},
        },
        "seconds": {"load": 3.1, "prune": 61.0, "export": 24.0, "verify": 140.0},
    }  # fmt: skip
    return Report(**{**values, **changes})
