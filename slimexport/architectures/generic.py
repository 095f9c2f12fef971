"""A table for a family that nobody wrote one for, read off the modules of the model: `--architecture auto`.

A guess, by the usual names and the shapes; whatever has another name or shape than expected is a reason to refuse. What
is guessed then has to pass the checks that the known families pass, on a tiny random model of the same class, before
anything is pruned.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.architectures.family import Family
from slimexport.architectures.weights import CHANNELS, HEAD_DIM, KEY_VALUE, QUERY, RESIDUAL, VOCAB, Axis, Weight
from slimexport.errors import BadInputError, reason

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

_NAMES = {  # the last part of a linear layer's name -> its axes [out, in]
    **dict.fromkeys(("q_proj",), (QUERY, RESIDUAL)),
    **dict.fromkeys(("k_proj", "v_proj"), (KEY_VALUE, RESIDUAL)),
    **dict.fromkeys(("o_proj", "out_proj", "dense"), (RESIDUAL, QUERY)),
    **dict.fromkeys(("up_proj", "gate_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h"), (CHANNELS, RESIDUAL)),
    **dict.fromkeys(("down_proj", "fc2", "fc_out", "dense_4h_to_h"), (RESIDUAL, CHANNELS)),
}
_ATTRIBUTES = {
    "num_heads": "query_heads", "num_attention_heads": "query_heads", "num_key_value_heads": "kv_groups",
    "num_kv_heads": "kv_groups", "num_key_value_groups": "heads_per_group",
}  # fmt: skip
CHECKED = ("table", "shrunk equals masked")


def generic_family(config: PreTrainedConfig, where: str, *, trusted: bool = False) -> Family:
    """Raises BadInputError that says what is not as expected, or which check failed."""
    try:
        family = _guess(config, trusted)
    except (_UnusualError, AttributeError) as error:
        raise BadInputError(f"{where} ({config.model_type}) cannot be pruned generically: {error}.") from error
    return _checked(family, config, where)


class _UnusualError(Exception):
    pass


def _guess(config: PreTrainedConfig, trusted: bool) -> Family:
    import torch
    from transformers import AutoModelForCausalLM

    for field in ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"):
        if getattr(config, field, None) is None:
            raise _UnusualError(f"its config has no {field}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trusted)
    blocks = _blocks(model, config.num_hidden_layers)
    block = next(model.get_submodule(blocks).children())
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = {
        RESIDUAL: config.hidden_size, QUERY: heads * head_dim, KEY_VALUE: groups * head_dim,
        CHANNELS: config.intermediate_size, HEAD_DIM: head_dim, VOCAB: config.vocab_size,
    }  # fmt: skip
    weights = tuple(_weight(name, tuple(p.shape), sizes) for name, p in block.named_parameters())
    output, ffn = (_only(weights, (RESIDUAL, axis)) for axis in (QUERY, CHANNELS))
    attention = output.rpartition(".")[0]
    names = {id(module): name for name, module in model.named_modules()}
    inside = f"{blocks}."
    outside = [(n, tuple(p.shape)) for n, p in model.named_parameters() if not n.startswith(inside)]
    return Family(
        model_type=config.model_type,
        block_weights=weights,
        model_weights=tuple(_outside(name, shape, sizes) for name, shape in outside),
        attention=attention,
        attention_output=output,
        ffn_output=ffn,
        ffn_factors=tuple(w.name.removesuffix(".weight") for w in weights if w.axes == (CHANNELS, RESIDUAL)),
        final_norm=None,
        decoder=names[id(model.get_decoder())],
        blocks=blocks,
        attributes={
            f"{attention}.{name}": size
            for name, size in _ATTRIBUTES.items()
            if hasattr(block.get_submodule(attention), name)
        },
        kv_groups_field="num_key_value_heads" if getattr(config, "num_key_value_heads", None) else None,
        head_dim_field="head_dim" if getattr(config, "head_dim", None) else None,
        guessed=True,
        eager=not model._supports_sdpa,
        outputs_normed=True,  # right for every way of adding up: each matrix toward what it gives in the dense model
    )


def _blocks(model: nn.Module, count: int) -> str:
    from torch import nn

    found = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise _UnusualError(f"it has no list of {count} blocks")
    blocks: Any = model.get_submodule(found[0])
    kinds = {frozenset((n, tuple(p.shape)) for n, p in block.named_parameters()) for block in blocks}
    if len(kinds) > 1:
        raise _UnusualError("its blocks are of several kinds")
    return found[0]


def _weight(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Weight:
    module, _, leaf = name.rpartition(".")
    axes: tuple[Axis, ...] | None = _NAMES.get(module.rpartition(".")[2])
    if axes is not None:
        axes = axes if leaf == "weight" else axes[:1]
    elif len(shape) == 1 and "norm" in module.rpartition(".")[2].replace("ln_", "norm"):
        axes = next(((axis,) for axis in (RESIDUAL, HEAD_DIM) if sizes[axis] == shape[0]), None)
        if "q_" in module or "k_" in module or "query" in module or "key" in module:
            axes = (HEAD_DIM,) if shape[0] == sizes[HEAD_DIM] else None
    if axes is None or tuple(sizes[str(axis)] for axis in axes) != shape:
        raise _UnusualError(f"nothing is known of its weight {name} {list(shape)}")
    return Weight(name, axes)


def _outside(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Weight:
    for axes in ((VOCAB, RESIDUAL), (RESIDUAL,), (VOCAB,)):
        if shape == tuple(sizes[axis] for axis in axes):
            return Weight(name, axes)
    raise _UnusualError(f"nothing is known of its weight {name} {list(shape)}")


def _only(weights: tuple[Weight, ...], axes: tuple[Axis, ...]) -> str:
    found = [w.name.removesuffix(".weight") for w in weights if w.axes == axes]
    if len(found) != 1:
        raise _UnusualError(f"its blocks have {len(found)} matrices from {axes[1]} to the residual, not one")
    return found[0]


def _checked(family: Family, config: PreTrainedConfig, where: str) -> Family:
    """With what only running a model of the kind shows."""
    from slimexport.architectures import registry
    from slimexport.testing import CHECKS, tiny_config
    from slimexport.testing.models import tiny_model
    from slimexport.testing.steps import gives_tuples

    switches = {name: value for name, value in config.to_dict().items() if isinstance(value, bool)}
    with registry.including(config.model_type, family):
        try:
            model = tiny_model(tiny_config(config.model_type, **switches))
            family = replace(family, returns_tuple=gives_tuples(model, family.blocks))
        except Exception as error:
            raise BadInputError(
                f"{where} ({config.model_type}) cannot be pruned generically: a tiny model of its kind does not run: "
                f"{reason(error)}"
            ) from error
    with registry.including(config.model_type, family), tempfile.TemporaryDirectory() as place:
        for name in CHECKED:
            try:
                CHECKS[name](tiny_config(config.model_type, **switches), Path(place))
            except Exception as error:
                raise BadInputError(
                    f"{where} ({config.model_type}) cannot be pruned generically: a tiny model of its kind does not "
                    f"pass the check {name!r}: {reason(error)}"
                ) from error
    return family
