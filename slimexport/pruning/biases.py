"""Biases for output matrices that have none, where the family's config can say them: what bias compensation needs."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

from slimexport.errors import BadInputError

if TYPE_CHECKING:
    from slimexport.architectures.base import Architecture
    from slimexport.loading import LoadedModel


def bias_fields(architecture: Architecture, *, required: bool) -> set[str]:
    """The config fields that must become true for o_proj and down_proj to have biases; none where they have them.

    Raises BadInputError where `required` and a matrix of this family can have no bias.
    """
    known = {w.name: w for w in architecture.family.block_weights}
    fields: set[str] = set()
    of_blocks = frozenset[str]().union(*architecture.block_flags)
    for module in (architecture.family.attention_output, architecture.family.ffn_output):
        weight = known.get(f"{module}.bias")
        if weight is None or any(condition.startswith("!") for condition in weight.conditions):
            if required:
                raise BadInputError(
                    f"The family {architecture.family.model_type} has no bias on {module}: use --bias-compensation "
                    "auto (then what it would compensate is lost there), or another criterion."
                )
        else:
            fields |= set(weight.conditions) - architecture.flags - of_blocks
    return fields


def with_output_biases(loaded: LoadedModel, *, required: bool) -> LoadedModel:
    """`loaded` with biases on o_proj and down_proj, zero where they are new; in place but for the architecture.

    The config field that brings them may bring others along (Llama's attention_bias also those of q, k and v): these
    are zero and stay so. Raises BadInputError as `bias_fields` does.
    """
    architecture = loaded.architecture
    fields = bias_fields(architecture, required=required)
    if not fields:
        return loaded
    grown = dataclasses.replace(architecture, flags=architecture.flags | fields)
    for block, own in zip(loaded.model.get_submodule(architecture.family.blocks), grown.by_block, strict=True):
        for weight in own.block_weights():
            if fields.intersection(weight.conditions):
                path, _, leaf = weight.name.rpartition(".")
                module_ = block.get_submodule(path)
                like = module_.get_parameter("weight")
                zeros = torch.zeros(like.shape[0], dtype=like.dtype, device=like.device)
                setattr(module_, leaf, nn.Parameter(zeros, requires_grad=like.requires_grad))
    config = copy.deepcopy(loaded.model.config)
    for name in fields:
        setattr(config, name, True)
    loaded.model.config = config
    return dataclasses.replace(loaded, architecture=grown)
