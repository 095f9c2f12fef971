"""Makes a block really smaller: slices its weights, puts in the compensated matrices, corrects module attributes, and
writes the sizes into the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slimexport.architectures.base import Architecture
from slimexport.architectures.family import Kept
from slimexport.architectures.weights import Weight
from slimexport.artifacts import BlockSizes
from slimexport.checkpoint.modeling_slimexport import BlockConfig, module_of, put_weight, set_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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
        parameter = stored(block, weight.name)
        given = (tensors or {}).get(weight.name)
        if given is None:
            new = architecture.slice_weight(weight, parameter.data, kept)
        else:
            new = given.to(device=parameter.device, dtype=parameter.dtype).contiguous()
        _replace(block, weight, new)
    family = architecture.family
    set_sizes(block, family.attributes, architecture.named_sizes(kept.sizes))
    for name in family.reads_config:
        module: Any = module_of(block, name)
        if module is not None:
            module.config = BlockConfig.over(module.config, family.config_fields(kept.sizes))


def stored(block: nn.Module, name: str) -> torch.Tensor:
    """The parameter, or the buffer, `name` of `block`."""
    path, _, leaf = name.rpartition(".")
    tensor: torch.Tensor = getattr(block.get_submodule(path), leaf)
    return tensor


def put(block: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """The parameter, or the buffer, `name` of `block` becomes `tensor`."""
    path, _, leaf = name.rpartition(".")
    put_weight(block.get_submodule(path), leaf, tensor)


def _replace(block: nn.Module, weight: Weight, new: torch.Tensor) -> None:
    old = stored(block, weight.name)
    if old.shape != new.shape or old.data_ptr() != new.data_ptr():
        put(block, weight.name, new)


def apply_sizes(config: PreTrainedConfig, architecture: Architecture, blocks: tuple[BlockSizes, ...]) -> None:
    """Makes `config` say `blocks`: plainly where all are equal and the family allows it, else per block.

    The global sizes of a per-block config stay those of the dense model, so that a reader that knows nothing of
    `per_layer_config` fails on tensor shapes instead of computing something else.
    """
    family = architecture.family
    if family.head_dim_field:
        setattr(config, family.head_dim_field, architecture.head_dim)  # never to be recomputed from the head count
    for name, value in family.settled.items():
        setattr(config, name, value)
    if family.channels is not None:
        setattr(config, family.channels_field, architecture.blocks[0].channels)
    config.per_layer_config = None
    config.__dict__.pop("allow_global_per_layer_attribute_access", None)  # of an earlier pruning
    if len(set(blocks)) == 1 and architecture.plain_config_can_say(blocks[0]):
        for name, value in family.config_fields(blocks[0]).items():
            setattr(config, name, value)
        return
    config.allow_global_per_layer_attribute_access = True  # the stock validators read global sizes
    config.per_layer_config = {i: family.config_fields(b) for i, b in enumerate(blocks)}
