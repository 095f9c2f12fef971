"""Adapters of low rank beside every linear layer of the blocks (LoRA, arXiv 2106.09685), by peft; merged afterwards."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from slimexport.errors import BadInputError
from slimexport.recovery.methods import registry
from slimexport.recovery.methods.distill import Distill

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from slimexport.architectures.base import Architecture
    from slimexport.config import RunConfig

INSTALL = "pip install 'slimexport[lora]'"


class Lora(Distill):
    learning_rate = 1e-3

    def check(self, architecture: Architecture) -> None:
        if importlib.util.find_spec("peft") is None:
            raise BadInputError(f"recover lora needs peft, which is not installed: {INSTALL}.")
        if architecture.experts > 1:
            raise BadInputError("recover lora: experts are kept in one tensor that takes no adapters; use distill.")

    def prepare(self, student: PreTrainedModel, architecture: Architecture, config: RunConfig) -> nn.Module:
        import torch
        from peft import LoraConfig, get_peft_model

        from slimexport.pruning.matrices import is_transposed

        blocks = f"{architecture.family.blocks}."
        named = {weight.name.removesuffix(".weight") for of in architecture.by_block for weight in of.block_weights()}
        linear = [
            name
            for name, module in student.named_modules()
            if name.startswith(blocks)
            and name.removeprefix(blocks).partition(".")[2] in named
            and getattr(module, "weight", None) is not None
            and module.weight.dim() == 2
        ]
        transposed = is_transposed(student.get_submodule(linear[0]))
        adapters = LoraConfig(
            r=config.recover_rank, lora_alpha=config.recover_rank, target_modules=linear, fan_in_fan_out=transposed
        )
        with torch.random.fork_rng():  # half of them begin at random
            torch.manual_seed(config.seed)
            return get_peft_model(student, adapters)

    def finish(self, trained: nn.Module) -> PreTrainedModel:
        return trained.merge_and_unload()  # type: ignore[operator]


registry.register("lora")(Lora())
