"""The model card in a checkpoint (README.md)."""

from __future__ import annotations

from slimexport import __version__
from slimexport.artifacts import ModelSource, PruningPlan, TextSource


def model_card(source: ModelSource, plan: PruningPlan, calibration: TextSource) -> str:
    """Markdown with the metadata that the Hub reads: what it was made from, how, and how to load it."""
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
    base = f"base_model: {source.name}\n" if source.kind == "hub" else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{base}tags: [slimexport, pruned, {plan.criterion}]
---

# {source.name}, {plan.ratio:.1%} of its block parameters removed

Pruned by slimexport {__version__} (criterion {plan.criterion}, allocation {plan.allocation}, layout {plan.layout}),
calibrated on {calibration.tokens} tokens of {calibration.name}. No training after pruning.

| | dense | this model |
| --- | --- | --- |
| parameters | {before.parameters:,} | {after.parameters:,} |
| bytes | {before.bytes:,} | {after.bytes:,} |
| KV cache, bytes per token | {before.kv_cache_bytes_per_token:,} | {after.kv_cache_bytes_per_token:,} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(directory)
model = {load}
```

{note}The licence of the base model applies.
"""
