"""What the checks are made of: pruning as `slimexport run` does, masking, saving, generating."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.architectures import architecture_of
from slimexport.artifacts import BlockSizes, CalibrationSet, ModelSource, PruningPlan, TextSource
from slimexport.config import RunConfig
from slimexport.loading import LoadedModel
from slimexport.testing.models import VOCAB, tiny_tokenizer

if TYPE_CHECKING:
    import torch

    from slimexport.architectures.base import Architecture
    from slimexport.architectures.family import Kept
    from slimexport.architectures.weights import Weight


def random_ids(sequences: int, length: int, seed: int) -> torch.Tensor:
    import torch

    return torch.randint(3, VOCAB, (sequences, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.no_grad():
        made: torch.Tensor = model(ids, use_cache=False).logits
    return made


def gives_tuples(model: Any, blocks: str) -> bool:
    """Whether a block of `model`, one of those in its module `blocks`, gives (hidden states, ...)."""
    given: list[bool] = []
    block = next(model.get_submodule(blocks).children())
    with block.register_forward_hook(lambda _module, _args, result: given.append(isinstance(result, tuple))):
        logits(model, random_ids(1, 8, seed=9))
    return given[0]


def greedy(model: Any, ids: torch.Tensor, *, cached: bool, stop: bool = False, tokens: int = 8) -> torch.Tensor:
    """Prompt and `tokens` greedy ones; `stop`: fewer where the end token comes first."""
    least = 0 if stop else tokens
    made: torch.Tensor = model.generate(
        ids, max_new_tokens=tokens, min_new_tokens=least, do_sample=False, use_cache=cached, pad_token_id=0
    )
    return made


def generated_by_genai(directory: Path, prompt: list[int], length: int) -> list[int]:
    """Greedy, until the end token or `length` tokens with the prompt."""
    import numpy as np
    import onnxruntime_genai as og

    model = og.Model(str(directory))
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=length, min_length=0, do_sample=False)
    generator = og.Generator(model, settings)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def pruned(
    model: Any, layout: str, ratio: float | None = None
) -> tuple[Architecture, PruningPlan, Any, tuple[Any, ...]]:
    """Prunes `model` in place as `slimexport run` would: (its dense architecture, plan, model, trace)."""
    from slimexport.pruning.planner import make_plan
    from slimexport.pruning.stage import prune_model

    architecture = architecture_of(model.config, "tiny")
    if ratio is None:
        ratio = 0.4 if heads_go(architecture, layout) else 0.2
    allocation = "uniform" if layout == "uniform" else "incremental"
    plan = make_plan(architecture, ratio=ratio, criterion="slimgpt", allocation=allocation, layout=layout, round_to=8)
    stored = str(next(model.parameters()).dtype).removeprefix("torch.")
    source = ModelSource("tiny", "directory", ".", None, "0" * 16, stored)
    ids = random_ids(12, 32, seed=3)
    made = prune_model(
        LoadedModel(model, None, architecture, source),
        plan,
        CalibrationSet(ids, TextSource("random", ids.numel(), "0" * 64), 0),
        RunConfig(model="tiny", device="cpu", group_size_start=8, curvature_tokens=128),
    )
    return architecture, plan, made.model, made.trace


def layouts(config: Any) -> tuple[str, ...]:
    """Those that models of this kind can have."""
    alone = architecture_of(config, "tiny").family.channels_of_experts_alone
    return ("per_layer", "uniform") if alone else ("per_layer",)


def heads_go(architecture: Architecture, layout: str) -> bool:
    dense = architecture.blocks[0]
    legal = [s for own in architecture.by_block for s in own.legal_heads(dense)]
    fewer = [s for s in legal if s != (dense.kv_groups, dense.heads_per_group)]
    return any(
        layout == "per_layer" or architecture.plain_config_can_say(BlockSizes(groups, per_group, dense.channels))
        for groups, per_group in fewer
    )


def mask_like(masked: Any, small: Any, architecture: Architecture, trace: tuple[Any, ...]) -> None:
    """Puts every tensor of `small` into the dense `masked`, at the places that were kept; the output matrices are zero
    elsewhere, so that nothing sees the heads and channels that went."""

    from slimexport.pruning.blocks import kept_of
    from slimexport.pruning.shrink import stored

    family = architecture.family
    blocks, thin = (m.get_submodule(family.blocks) for m in (masked, small))
    outputs = (family.attention_weight, family.ffn_weight)
    for block, own, of, table in zip(blocks, thin, trace, architecture.by_block, strict=True):
        kept = kept_of(of, architecture.blocks[of.block], architecture.experts)
        if table.has_heads:
            assert len(kept.query_heads) * architecture.head_dim in own.get_parameter(outputs[0]).shape
        for weight in table.block_weights():
            full, part = stored(block, weight.name).data, stored(own, weight.name).data
            if weight.name in outputs:
                full.zero_()
            put(architecture, weight, kept, full, part)
    for weight in family.model_weights:
        if weight.name in dict(small.named_parameters()):
            masked.get_parameter(weight.name).data.copy_(small.get_parameter(weight.name).data)


def put(architecture: Architecture, weight: Weight, kept: Kept, full: torch.Tensor, part: torch.Tensor) -> None:
    """Puts `part`, a weight of a shrunk block, into `full`, the same of the dense one, at the places that were kept."""
    import torch

    if weight.is_per_expert:
        one = replace(weight, axes=weight.axes[1:])
        for expert in range(architecture.experts):
            put(architecture, one, kept.of_expert(expert), full[expert], part[expert])
        return
    if not weight.axes:  # a number
        full.copy_(part)
        return
    indices = [architecture.axis_index(axis, kept) for axis in weight.axes]
    where = [
        torch.arange(length) if index is None else torch.tensor(index)
        for length, index in zip(full.shape, indices, strict=True)
    ]
    full[torch.meshgrid(*where, indexing="ij")] = part


def saved(model: Any, plan: PruningPlan, directory: Path) -> Path:
    from slimexport.checkpoint.save import save_checkpoint

    directory.mkdir(parents=True)
    architecture = architecture_of(model.config, "tiny")
    save_checkpoint(model, tiny_tokenizer(), architecture, plan, directory, card="")
    return directory
