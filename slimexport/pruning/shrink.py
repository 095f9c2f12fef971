"""Makes a block really smaller: slices its weights, puts in the compensated matrices, corrects module attributes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from slimexport.architectures.base import CHANNELS, KEY_VALUE, QUERY, Architecture, Kept, Weight


def shrink_block(
    block: nn.Module, architecture: Architecture, kept: Kept, tensors: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Slices every weight of `block` in place to what `kept` says.

    Args:
        block: a decoder layer whose weights have the sizes that `kept` indexes into.
        tensors: name -> tensor of the *shrunk* shape that replaces the sliced one (compensated output matrices, or a
            whole restored block); the block's dtype and device are kept.
    """
    for weight in architecture.block_weights():
        parameter = block.get_parameter(weight.name)
        given = (tensors or {}).get(weight.name)
        if given is None:
            new = architecture.slice_weight(weight, parameter.data, kept)
        else:
            new = given.to(device=parameter.device, dtype=parameter.dtype)
        _replace(block, weight, new)
    attention = block.get_submodule(architecture.family.attention)
    if hasattr(attention, "num_key_value_groups"):
        attention.num_key_value_groups = kept.sizes.heads_per_group  # type: ignore[assignment]


def _replace(block: nn.Module, weight: Weight, new: torch.Tensor) -> None:
    path, _, leaf = weight.name.rpartition(".")
    module = block.get_submodule(path)
    old = getattr(module, leaf)
    if old.shape == new.shape and old.data_ptr() == new.data_ptr():
        return
    setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
    if isinstance(module, nn.Linear) and leaf == "weight":
        module.out_features, module.in_features = new.shape


def mask_block(block: nn.Module, architecture: Architecture, kept: Kept, tensors: Mapping[str, torch.Tensor]) -> None:
    """The dense twin of `shrink_block`: same sizes, zeros where something went. For tests and ablations.

    Zero columns in the output matrices make removed heads and channels invisible to the rest of the model.
    `tensors` holds full-size output matrices with zeros in the removed columns.
    """
    for weight in architecture.block_weights():
        if weight.name in tensors:
            parameter = block.get_parameter(weight.name)
            parameter.data.copy_(tensors[weight.name])
            for dim, axis in enumerate(weight.axes):
                index = architecture.axis_index(axis, kept)
                if index is not None and axis in (QUERY, KEY_VALUE, CHANNELS):
                    gone = torch.ones(parameter.shape[dim], dtype=torch.bool)
                    gone[index] = False
                    assert not parameter.data.index_select(dim, gone.nonzero().flatten()).any(), weight.name
