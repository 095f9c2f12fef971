"""Decoder models whose blocks have different numbers of heads and channels.

transformers (>= 5.15) reads such sizes into `config.per_layer_config`, but its models still build every block from the
global config. `PerBlockSizes` in front of a stock class gives the tensors of each block the sizes of that block.
slimexport itself uses this file, and a copy lies in every per_layer checkpoint, where
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` finds it. It needs torch and transformers.
"""

import copy
from collections.abc import Mapping
from typing import Any

import transformers  # noqa: F401 - for the class that a checkpoint adds below
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class PerBlockSizes:
    """Mixin, as in `class LlamaForCausalLM(PerBlockSizes, transformers.LlamaForCausalLM)`. `table` says of the family:

    blocks: where the list of blocks lives.
    head_dim: of all heads.
    query_axes: what runs through the query heads -> the entries that each of these has there.
    heads, groups, channels: the fields of a block's config; groups may be a number, or None for one to every head.
    weights: name -> what each dimension runs along: a size's name, a list of them one after the other, or None for what
        no block changes.
    attributes: attributes of modules -> the name of the size they hold.
    reads_config: modules that look sizes up in their config.
    """

    table: dict[str, Any]

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: tensors of this class have the names of the stock class's, in memory and on disk, and transformers
        turns the one into the other by the name of the class."""
        return False

    # Whether attention and experts can be computed in other ways than the plain one is read off the source of a class's
    # module, which here is this file: the stock class's is meant.

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls._stock()._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls._stock()._can_set_experts_implementation()

    @classmethod
    def _stock(cls) -> Any:
        return cls.__mro__[cls.__mro__.index(PerBlockSizes) + 1]

    def __init__(self, config: Any):
        # The stock constructor reads global sizes, those of the dense model: it is given a config that has nothing else
        # (from_pretrained builds on the meta device, so what is replaced below never takes memory).
        plain = copy.deepcopy(config)
        plain.per_layer_config = None
        super().__init__(plain)
        # How attention and experts are computed was settled by the stock constructor, on its own copy.
        for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if hasattr(plain, name):
                setattr(config, name, getattr(plain, name))
        given = self.config
        for module in self.modules():
            if getattr(module, "config", None) is given:
                # One config object for all, so that set_attn_implementation() reaches every block. Some modules have
                # another one of their own (Granite's rotary positions, whose base differs by block).
                module.config = config
        for block, own in zip(self.get_submodule(self.table["blocks"]), config.per_layer_config, strict=True):
            sizes = named_sizes(self.table, own)
            for name, axes in self.table["weights"].items():
                resize(block, name, axes, sizes)
            set_sizes(block, self.table["attributes"], sizes)
            fields = {
                f: getattr(own, f) for f in map(self.table.get, ("heads", "groups", "channels")) if type(f) is str
            }
            for name in self.table["reads_config"]:
                reader: Any = module_of(block, name)
                if reader is not None:
                    reader.config = BlockConfig.over(config, fields)
        self.post_init()


def named_sizes(table: dict[str, Any], own: Any) -> dict[str, int]:
    """What a block's dimensions and its modules' attributes can be as long as."""
    heads, groups = getattr(own, table["heads"]), table["groups"]
    if groups is None:
        groups = heads
    elif isinstance(groups, str):
        groups = getattr(own, groups)
    return {
        **{name: heads * width for name, width in table["query_axes"].items()},
        "key_value": groups * table["head_dim"],
        "channels": getattr(own, table["channels"]),
        "query_heads": heads,
        "kv_groups": groups,
        "heads_per_group": heads // groups,
    }


def resize(block: nn.Module, name: str, axes: list[Any], sizes: dict[str, int]) -> None:
    """Gives weight `name` the shape that `sizes` ask for; what it holds is lost where that is another one."""
    path, _, leaf = name.rpartition(".")
    module = module_of(block, path)
    old = getattr(module, leaf, None)
    if module is None or old is None:
        return
    shape = [
        length if axis is None else sum(sizes[part] for part in ([axis] if isinstance(axis, str) else axis))
        for axis, length in zip(axes, old.shape, strict=True)
    ]
    if shape == list(old.shape):
        return
    put_weight(module, leaf, old.new_empty(shape))


def module_of(block: nn.Module, path: str) -> "nn.Module | None":
    """None in a block of another kind, which has no such module."""
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


def put_weight(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Makes `tensor`, of whatever size, the parameter `leaf` of `module`; the buffer, where it is one."""
    old = getattr(module, leaf)
    if not isinstance(old, nn.Parameter):
        setattr(module, leaf, tensor)
        return
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=old.requires_grad))
    if isinstance(module, nn.Linear) and leaf == "weight":
        module.out_features, module.in_features = tensor.shape
    elif isinstance(module, Conv1D) and leaf == "weight":
        module.nx, module.nf = tensor.shape


def set_sizes(block: nn.Module, attributes: Mapping[str, str], sizes: dict[str, int]) -> None:
    """Corrects what the modules of `block` remember of their sizes."""
    for name, size in attributes.items():
        path, _, leaf = name.rpartition(".")
        module = module_of(block, path)
        if module is not None and hasattr(module, leaf):
            setattr(module, leaf, sizes[size])


class BlockConfig:
    """The model's config, but for the sizes of one block: for modules that look them up while they run."""

    def __init__(self, config: Any, fields: dict[str, int]):
        self.__dict__.update(_config=config, _fields=fields)

    @classmethod
    def over(cls, config: Any, fields: dict[str, int]) -> "BlockConfig":
        return cls(config._config if isinstance(config, cls) else config, fields)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        fields = self.__dict__.get("_fields", {})
        return fields[name] if name in fields else getattr(self.__dict__["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_config"], name, value)
