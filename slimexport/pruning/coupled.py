"""What goes with a head or a channel besides its columns of the output matrix, for criteria that look at it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from slimexport.architectures.base import Architecture
from slimexport.architectures.family import Kept
from slimexport.architectures.weights import CHANNELS, OF_HEADS, QUERY, Fused, Weight

_SOURCES = {QUERY: OF_HEADS, CHANNELS: (CHANNELS,)}  # axes whose rows make the inputs of an output matrix


def coupled(
    architecture: Architecture,
    block: nn.Module,
    gradients: Mapping[str, torch.Tensor],
    whole: Kept,
    axis: str,
    expert: int,
    device: torch.device,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(sources, gradients) as `Site` has them, float64, for the output matrix whose inputs run along `axis`.

    Args:
        gradients: by every weight of the block, by name, as they are stored.
        whole: everything of the block as it is now.
        expert: whose matrices, where there are experts.
    """
    family = architecture.family
    output = family.attention_weight if axis == QUERY else family.ffn_weight
    sources: dict[str, torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}
    for weight in architecture.block_weights():
        if weight.name not in gradients:
            continue
        stored, gradient = block.get_parameter(weight.name).data, gradients[weight.name]
        if weight.is_per_expert:
            weight = replace(weight, axes=weight.axes[1:])
            stored, gradient = stored[expert], gradient[expert]
        if weight.name == output:
            gradient = gradient.T if weight.transposed else gradient
            found[output] = gradient.to(device, torch.float64)
            continue
        for key, rows, of_rows in _rows_along(architecture, weight, whole, axis, stored, gradient):
            sources[key] = rows.to(device, torch.float64)
            found[key] = of_rows.to(device, torch.float64)
    return sources, found


def _rows_along(
    architecture: Architecture, weight: Weight, whole: Kept, axis: str, *tensors: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, rows of the first tensor, of the second) of what `weight` has along the axes that make the inputs of an
    output matrix: each part of a fused one apart, rows first however it is stored."""
    for dim, along in enumerate(weight.axes):
        if isinstance(along, Fused):
            for number, (part, index) in enumerate(architecture.fused_index(along, whole)):
                if part in _SOURCES[axis]:
                    first, second = (t.movedim(dim, 0)[index] for t in tensors)
                    yield f"{weight.name}[{number}]", first, second
        elif along in _SOURCES[axis]:
            first, second = (t.movedim(dim, 0) for t in tensors)
            yield weight.name, first, second
