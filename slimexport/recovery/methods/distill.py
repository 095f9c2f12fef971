"""All weights of the blocks are trained. Embedding and lm_head, which pruning did not touch, stay as they are: words
that the text has not would be drawn along."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from slimexport.recovery.methods import registry

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from slimexport.architectures.base import Architecture
    from slimexport.config import RunConfig
    from slimexport.recovery.training import Training


class Distill:
    learning_rate = 2e-4
    one_by_one = False

    def check(self, architecture: Architecture) -> None:
        """Every family can."""

    def prepare(self, student: PreTrainedModel, architecture: Architecture, config: RunConfig) -> nn.Module:
        student.requires_grad_(True)
        for part in (student.get_input_embeddings(), student.get_output_embeddings()):
            if part is not None:
                part.requires_grad_(False)
        return student

    def training(self, architecture: Architecture) -> Callable[..., Training]:
        from slimexport.recovery.training import Training

        return Training

    def finish(self, trained: nn.Module) -> PreTrainedModel:
        return trained


registry.register("distill")(Distill())
