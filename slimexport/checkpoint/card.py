"""The model card in a checkpoint (README.md), with the metadata that the Hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from slimexport import __version__
from slimexport.artifacts import ModelSource, PruningPlan, Recovery, TextSource, VerificationReport

CARD = "README.md"
# What of a report goes into the card: figures that another run on the same machine finds again.
_METRICS = {
    "accuracy.perplexity": ("perplexity", "token perplexity"),
    "accuracy.kl": ("kl_divergence", "KL divergence to the dense model (nats/token)"),
    "accuracy.top1_agreement": ("top1_agreement", "top-1 agreement with the dense model"),
}


def license_of(place: Path) -> str | None:
    """What the card of the base model says, beside its weights or in its GGUF file; None where nothing does."""
    if place.is_file():
        return _license_in_gguf(place)
    try:
        parts = (place / CARD).read_text(encoding="utf-8").split("---\n", 2)
        said = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    found = said.get("license") if isinstance(said, dict) else None
    return str(found) if isinstance(found, str) else None


def _license_in_gguf(path: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("general.license")
    return str(field.contents()) if field is not None else None


def model_card(
    source: ModelSource,
    plan: PruningPlan,
    calibration: TextSource,
    report: VerificationReport | None = None,
    evaluation: TextSource | None = None,
    recovery: Recovery | None = None,
) -> str:
    """What it was made from, how, what it lost (once that was measured, on `evaluation`), and how to load it.

    `recovery` is only of the checkpoint that was trained.
    """
    before, after = plan.dense_estimates, plan.estimates
    per_block = len(set(plan.blocks)) > 1
    load = (
        "AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)"
        if per_block
        else "AutoModelForCausalLM.from_pretrained(directory)"
    )
    note = (
        "Blocks differ in size. The one Python file here builds them; `slimexport.load(directory)` does without it.\n"
        if per_block
        else "A plain checkpoint: all blocks have the same sizes.\n"
    )
    licence = (
        f"The licence of the base model ({source.license}) applies."
        if source.license
        else ("The licence of the base model applies.")
    )
    title = f"{source.name}, {plan.ratio:.1%} of its block parameters removed"
    return f"""---
{_metadata(source, plan, title, report, evaluation)}---

# {title}

Pruned by slimexport {__version__} (criterion {plan.criterion}, allocation {plan.allocation}, layout {plan.layout}),
calibrated on {calibration.tokens} tokens of {calibration.name}.{_training(recovery)}

| | dense | this model |
| --- | --- | --- |
| parameters | {before.parameters:,} | {after.parameters:,} |
| bytes | {before.bytes:,} | {after.bytes:,} |
| KV cache, bytes per token | {before.kv_cache_bytes_per_token:,} | {after.kv_cache_bytes_per_token:,} |
{_measured(report)}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(directory)
model = {load}
```

{note}{licence}
"""


def _training(recovery: Recovery | None) -> str:
    if recovery is None:
        return " No training after pruning."
    texts = "; ".join(
        f"{part.name} ({', '.join(said for said in (part.license, part.note) if said)})" if part.license or part.note
        else part.name
        for part in recovery.texts
    )  # fmt: skip
    share = recovery.settings.get("recover_text_share", 0.0)
    toward = "the text" if share == 1 else f"the base model's output{f' and the text ({share:g})' if share else ''}"
    return (
        f"\n\nThen trained toward {toward}: {recovery.method}, {recovery.kept.tokens:,} tokens, "
        f"{recovery.seconds / 60:.0f} minutes; {recovery.gain}. Texts: {texts}."
    )


def _metadata(
    source: ModelSource, plan: PruningPlan, title: str, report: VerificationReport | None, evaluation: TextSource | None
) -> str:
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if source.kind == "hub":
        data["base_model"] = source.name
    if source.license:
        data["license"] = source.license
    data["tags"] = ["slimexport", "pruned", plan.criterion]
    if report is not None and (results := _results(report, evaluation)):
        data["model-index"] = [{"name": title, "results": results}]
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _results(report: VerificationReport, evaluation: TextSource | None) -> list[dict[str, Any]]:
    """As the Hub's `model-index` wants them."""
    task = {"type": "text-generation"}
    found = [
        {"type": kind, "name": name, "value": round(figure.shrunk, 5)}
        for key, (kind, name) in _METRICS.items()
        if (figure := report.figure(key)) is not None and figure.valid and figure.shrunk is not None
    ]
    text = evaluation.name if evaluation else "evaluation text"
    made = [{"task": task, "dataset": {"type": "text", "name": text}, "metrics": found}] if found else []
    for name, record in report.tasks.items():
        scores = record.get("metrics", {}).get("shrunk", {})
        metrics = [{"type": metric, "value": round(value, 5)} for metric, value in scores.items()]
        if metrics:
            made.append({"task": task, "dataset": {"type": name, "name": name}, "metrics": metrics})
    return made


def _measured(report: VerificationReport | None) -> str:
    """Further rows of the table."""
    rows = []
    for figure in report.figures if report is not None else ():
        known = figure.name in _METRICS or (figure.name.startswith("task.") and not figure.name.endswith("_agreement"))
        if known and figure.valid and figure.shrunk is not None:
            name = _METRICS.get(figure.name, ("", figure.name.removeprefix("task.")))[1]
            dense = "" if figure.baseline is None else f"{figure.baseline:.4g}"
            rows.append(f"| {name} | {dense} | {figure.shrunk:.4g} |\n")
    return "".join(rows)
