"""What memory training will take, counted from sizes, and how many sequences at once keep a limit.

Of a parameter that is trained: the weight, its gradient and two moments in float32. Of a token in a forward pass: what
every block keeps for the pass backwards, and three rows of logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slimexport.architectures.base import Architecture
from slimexport.errors import BadInputError
from slimexport.pruning.memory import CUDA_BYTES, LIBRARIES_BYTES, columns_of
from slimexport.recovery.losses import ROWS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from slimexport.config import RunConfig
    from slimexport.recovery.training import Recipe

# Counted on Llama's block (torch 2.13, transformers 5.24), what autograd keeps: of the residual stream twice two norms'
# inputs and outputs in float32 and what the linear layers are given; queries, keys and values before and after rotary
# embedding, and the heads' outputs; gate, up, the activation and the product.
RESIDUALS, HEADS, CHANNELS = 8, 6, 5
TOKENS = 131_072  # whose hidden states are kept where blocks are trained one by one, at most


@dataclass(frozen=True)
class Needs:
    """Peaks in bytes."""

    host: int  # of the process, with its libraries
    device: int  # of the CUDA device; 0 without one


def fitting(
    student: nn.Module, teacher: nn.Module, architecture: Architecture, recipe: Recipe, config: RunConfig,
    device: torch.device, *, one_by_one: bool = False,
) -> Recipe:  # fmt: skip
    """`recipe`, with as many sequences in a forward pass as the limits of `config` allow. `one_by_one`: blocks are
    trained one after the other.

    Raises BadInputError where they do not even allow one, with what is needed.
    """
    tried = [
        replace(recipe, together=together)
        for together in (recipe.together >> halvings for halvings in range(recipe.together.bit_length()))
    ]
    asked = {"max-memory": config.memory_limit, "max-device-memory": config.device_memory_limit}
    for one in tried:
        found = needs(student, teacher, architecture, one, config.recover_length, device, one_by_one=one_by_one)
        took = {"max-memory": found.host, "max-device-memory": found.device}
        broken = [flag for flag, limit in asked.items() if limit is not None and took[flag] > limit]
        if not broken:
            return one
    flag = broken[0]
    limit = asked[flag]
    assert limit is not None
    raise BadInputError(
        f"Training needs {took[flag] / 1e9:.2f} GB of {'device ' if flag == 'max-device-memory' else ''}memory, with "
        f"one sequence of {config.recover_length} tokens in a forward pass: --{flag} {limit / 1e9:.2f} GB cannot be "
        "kept. --recover local, or lora, needs less."
    )


def needs(
    student: nn.Module, teacher: nn.Module, architecture: Architecture, recipe: Recipe, length: int,
    device: torch.device, *, one_by_one: bool = False,
) -> Needs:  # fmt: skip
    """`student` is prepared: what requires a gradient is trained."""
    width = recipe.autocast.itemsize if recipe.autocast else 4
    parameters = sum(parameter.numel() for parameter in student.parameters())
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    dense = width * sum(parameter.numel() for parameter in teacher.parameters())
    copies = width * parameters if recipe.autocast else 0  # of the weights, in the precision of a forward pass
    tokens, blocks = recipe.together * length, len(architecture.blocks)
    states = 0
    if one_by_one:
        trained, states = -(-trained // blocks), (4 + width) * TOKENS * architecture.hidden
    models = 4 * parameters + 12 * trained + copies + dense + states
    passing = tokens * _of_a_token(architecture, width, one_by_one) + 5 * 4 * ROWS * architecture.vocab
    if device.type != "cuda":
        return Needs(LIBRARIES_BYTES + models + passing, 0)
    # Models are read into the memory of the host; states are saved from there.
    return Needs(
        LIBRARIES_BYTES + CUDA_BYTES + 4 * parameters + 8 * trained + dense, CUDA_BYTES // 2 + models + passing
    )


def _of_a_token(architecture: Architecture, width: int, one_by_one: bool) -> int:
    each = [
        4 * RESIDUALS * own.hidden
        + width * HEADS * columns_of(sizes, own)
        + width * CHANNELS * sizes.channels * own.active_experts
        for own, sizes in zip(architecture.by_block, architecture.blocks, strict=True)
    ]
    if one_by_one:  # judging has two rows of logits
        return max(*each, 2 * width * architecture.vocab)
    return sum(each) + 3 * width * architecture.vocab
