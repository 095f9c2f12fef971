"""Reads what a model really holds from its weights, because a config may not say it (or refuse to)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimexport.artifacts import BlockSizes
from slimexport.targets.base import BuilderUnsupportedError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

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
    values = config.to_dict()
    value = values.get(name)
    return default if value is None else value


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of a llama-like model. Raises BuilderUnsupportedError for other structures."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not layers:
        raise BuilderUnsupportedError(f"{type(model).__name__} has no list of decoder layers at model.layers.")
    return list(layers)


def linear(block: nn.Module, name: str) -> nn.Linear:
    """Raises BuilderUnsupportedError where the block has no linear layer of that name."""
    from torch import nn

    try:
        found = block.get_submodule(name)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Linear):
        raise BuilderUnsupportedError(f"its decoder layers have no linear layer {name}.")
    return found


def head_dim(model: PreTrainedModel) -> int:
    """From the config where it is explicit, else hidden_size / num_attention_heads of the (then plain) config."""
    explicit = raw(model.config, "head_dim")
    if explicit:
        return int(explicit)
    return int(model.config.hidden_size) // int(model.config.num_attention_heads)


def block_sizes(model: PreTrainedModel) -> tuple[BlockSizes, ...]:
    """Sizes of every block, from the shapes of its weights.

    Raises BuilderUnsupportedError where they do not fit together (a KV group with unequal query heads, say).
    """
    dim = head_dim(model)
    return tuple(_sizes(block, index, dim) for index, block in enumerate(decoder_blocks(model)))


def _sizes(block: nn.Module, index: int, dim: int) -> BlockSizes:
    names = [f"self_attn.{part}_proj" for part in ("q", "k", "v", "o")]
    names += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    shapes = {name.split(".")[1]: tuple(linear(block, name).weight.shape) for name in names}
    query, key, value, output, gate, up, down = shapes.values()
    heads, groups, channels = query[0] // dim, key[0] // dim, gate[0]
    fits = query[0] == heads * dim == output[1] and key[0] == groups * dim == value[0] and channels == up[0] == down[1]
    if not fits or groups == 0 or heads % groups:
        raise BuilderUnsupportedError(
            f"the weights of block {index} do not fit together with head_dim {dim}: "
            + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        )
    return BlockSizes(kv_groups=groups, heads_per_group=heads // groups, channels=channels)


def plain_config(model: PreTrainedModel) -> PretrainedConfig:
    """A config of the same class for *one* head and one KV head, everything else as in `model.config`.

    One head is legal in every family (some ask that the head count divides hidden_size); the real counts belong to
    the blocks and are put in there.
    """
    values = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_IN_A_PLAIN_CONFIG}
    values |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": head_dim(model)}
    return type(model.config)(**values)
