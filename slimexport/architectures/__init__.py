"""Model families that can be pruned: one short file each in `families/`, found by the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimexport.architectures.base import Architecture
from slimexport.architectures.family import Family
from slimexport.errors import BadInputError
from slimexport.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

registry: Registry[Family] = Registry(
    "architecture", package="slimexport.architectures.families", group="slimexport.architectures"
)


def architecture_of(
    config: PreTrainedConfig, where: str, *, auto: bool = False, trusted: bool = False
) -> Architecture:  # fmt: skip
    """The table of `config`'s family with its sizes; `auto`: guessed and checked where nobody wrote one, and known from
    then on in this process. `trusted`: the model's own code may be run for that.

    Raises BadInputError that names the family, and says where the supported ones are or that the model is no decoder;
    with `auto` what stands against a guess.
    """
    known = registry.names()
    if config.model_type not in known:
        classes = getattr(config, "architectures", None) or []
        other = getattr(config, "is_encoder_decoder", False) or (classes and not any("CausalLM" in c for c in classes))
        if auto and not other:
            from slimexport.architectures.generic import generic_family

            registry.register(config.model_type)(generic_family(config, where, trusted=trusted))
        else:
            what = f"model family {config.model_type!r}"
            if other:
                what += f" ({', '.join(classes) or 'encoder-decoder'}), which is no decoder-only language model"
            raise BadInputError(
                f"{where} is of {what}; `slimexport architectures` lists the {len(known)} families that can be pruned"
                + ("." if other else ", --architecture auto tries others.")
            )
    return Architecture.from_config(registry.get(config.model_type), config)
