"""Every block is trained by itself, toward what the dense block gives (recovery/blockwise.py)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from slimexport.recovery.methods import registry
from slimexport.recovery.methods.distill import Distill

if TYPE_CHECKING:
    from collections.abc import Callable

    from slimexport.architectures.base import Architecture
    from slimexport.recovery.training import Training


class Local(Distill):
    learning_rate = 3e-4
    one_by_one = True

    def training(self, architecture: Architecture) -> Callable[..., Training]:
        from slimexport.recovery.blockwise import BlockwiseTraining

        return partial(BlockwiseTraining, architecture)


registry.register("local")(Local())
