"""Reads what a model really holds from its weights, because a config may not say it (or refuse to)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slimexport.architectures import architecture_of
from slimexport.architectures.weights import CHANNELS, KEY_VALUE, QUERY, Fused, parts_of
from slimexport.artifacts import BlockSizes
from slimexport.errors import BadInputError
from slimexport.targets.base import BuilderUnsupportedError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from slimexport.architectures.base import Architecture

# Not part of the architecture, or about how sizes differ per block.
_NOT_IN_A_PLAIN_CONFIG = (
    "allow_global_per_layer_attribute_access",
    "architectures",
    "auto_map",
    "dtype",
    "per_layer_config",
    "quantization_config",
    "serialize_explicit_per_layer_config",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
)


def raw(config: PretrainedConfig, name: str, default: Any = None) -> Any:
    """`config.name` past the guard that a heterogeneous config puts before attributes that differ per block."""
    value = config.to_dict().get(config.attribute_map.get(name, name))  # GPT-2 calls it n_embd
    return default if value is None else value


def architecture(model: PreTrainedModel) -> Architecture:
    """The table of the model's weights, with the sizes that they have.

    Raises BuilderUnsupportedError for a family without one, and where sizes do not fit together (a KV group with
    unequal query heads, say).
    """
    try:
        said = architecture_of(model.config, type(model).__name__)
    except BadInputError as error:
        raise BuilderUnsupportedError(str(error)) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return said.with_blocks(tuple(_sizes(said, shapes, index) for index in range(len(said.blocks))))


def _sizes(said: Architecture, shapes: Mapping[str, tuple[int, ...]], index: int) -> BlockSizes:
    prefix = f"{said.family.blocks}.{index}."
    own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    lengths: dict[str, int] = {}
    this = said.by_block[index]
    for fused in (False, True):  # what stands alone first: it says what the rest of a fused axis is
        for weight in this.block_weights():
            for axis, length in zip(weight.axes, own.get(weight.name, ()), strict=False):
                unknown = [part for part in parts_of(axis) if part not in lengths]
                if isinstance(axis, Fused) == fused and unknown:
                    known = sum(lengths.get(part, 0) for part in parts_of(axis))
                    lengths[unknown[0]] = (length - known) // len(unknown)
    heads, groups = (lengths.get(axis, 0) // said.head_dim for axis in (QUERY, KEY_VALUE))
    sizes = said.blocks[index]
    if this.has_heads and groups and heads % groups == 0:
        sizes = dataclasses.replace(sizes, kv_groups=groups, heads_per_group=heads // groups)
    if this.has_channels:
        sizes = dataclasses.replace(sizes, channels=lengths.get(CHANNELS, 0))
    if this.block_shapes(sizes).items() <= own.items():
        return sizes
    matrices = [weight.name for weight in this.block_weights() if weight.is_matrix]
    raise BuilderUnsupportedError(
        f"the weights of block {index} do not fit together with head_dim {said.head_dim}: "
        + ", ".join(f"{name.removesuffix('.weight')} {own.get(name)}" for name in matrices)
    )


def plain_config(model: PreTrainedModel) -> PretrainedConfig:
    """A config of the same class for *one* head and one KV head, everything else as in `model.config`.

    One head is legal in every family (some ask that the head count divides hidden_size); the real counts belong to
    the blocks and are put in there. Families that compute head_dim from the head count keep theirs.
    """
    values = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_IN_A_PLAIN_CONFIG}
    known = architecture(model)
    if known.family.head_dim_field is not None:
        fields = known.family.config_fields(dataclasses.replace(known.blocks[0], kv_groups=1, heads_per_group=1))
        values |= {**fields, known.family.head_dim_field: known.head_dim}
    return type(model.config)(**values)
