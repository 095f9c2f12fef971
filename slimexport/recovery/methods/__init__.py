"""How recovery changes a model: one file each, found by the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from slimexport.registry import Registry

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from slimexport.architectures.base import Architecture
    from slimexport.config import RunConfig
    from slimexport.recovery.training import Training


class Method(Protocol):
    """`learning_rate` is the highest one where the config names none; `one_by_one`: blocks are trained one after the
    other."""

    learning_rate: float
    one_by_one: bool

    def check(self, architecture: Architecture) -> None:
        """Raises BadInputError for a family that it cannot train, or for a package that is not here."""
        ...

    def prepare(self, student: PreTrainedModel, architecture: Architecture, config: RunConfig) -> nn.Module:
        """What is called in training, made of `student`: parameters that are trained require a gradient, no others."""
        ...

    def training(self, architecture: Architecture) -> Callable[..., Training]:
        """What is called as `Training` is, and makes one."""
        ...

    def finish(self, trained: nn.Module) -> PreTrainedModel:
        """The model in its old shape, with what was learnt in its weights."""
        ...


registry: Registry[Method] = Registry(
    "recovery method", package="slimexport.recovery.methods", group="slimexport.recovery_methods"
)
