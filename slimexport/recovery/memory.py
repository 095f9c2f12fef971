"""What memory training will take, counted from sizes, and how many sequences at once keep a limit.

Of a parameter that is trained: the weight and its gradient in float32, and the optimiser's two moments. Of a token in a
forward pass: what every block keeps for the pass backwards, and three rows of logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slimexport.architectures.base import Architecture
from slimexport.errors import BadInputError
from slimexport.pruning.memory import CUDA_BYTES, LIBRARIES_BYTES, columns_of
from slimexport.recovery.losses import ROWS
from slimexport.recovery.optimisers import MOMENT_BYTES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from slimexport.config import RunConfig
    from slimexport.recovery.training import Recipe

# Counted on Llama's block (torch 2.13, transformers 5.24), what autograd keeps: of the residual stream twice two norms'
# inputs and outputs in float32 and what the linear layers are given; queries, keys and values before and after rotary
# embedding, and the heads' outputs; gate, up, the activation and the product.
RESIDUALS, HEADS, CHANNELS = 8, 6, 5
STEP_BYTES = 24  # bitsandbytes on the CPU, of a parameter's number: moments, gradient and quotients in float32
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
        f"kept. {recipe.lighter[0].upper()}{recipe.lighter[1:]} needs less."
    )


def lighter(config: RunConfig, architecture: Architecture) -> str:
    """What to ask for where what `config` asks for is too much."""
    found = []
    if config.recover_optimizer == "adamw" and config.recover != "lora":
        found.append("--recover-optimizer adamw-8bit")
    if config.recover == "distill":
        found += ["--recover local", *(["--recover lora"] if architecture.experts == 1 else [])]
    return ", or ".join([*found, "a shorter --recover-length"])


def needs(
    student: nn.Module, teacher: nn.Module, architecture: Architecture, recipe: Recipe, length: int,
    device: torch.device, *, one_by_one: bool = False,
) -> Needs:  # fmt: skip
    """`student` is prepared: what requires a gradient is trained."""
    width = recipe.autocast.itemsize if recipe.autocast else 4
    sizes = [parameter.numel() for parameter in student.parameters() if parameter.requires_grad]
    parameters, trained = sum(parameter.numel() for parameter in student.parameters()), sum(sizes)
    dense = width * sum(parameter.numel() for parameter in teacher.parameters())
    copies = width * parameters if recipe.autocast else 0  # of the weights, in the precision of a forward pass
    tokens, blocks = recipe.together * length, len(architecture.blocks)
    looked_at = length if getattr(student.config, "_attn_implementation", None) == "eager" else 0
    passing = tokens * _of_a_token(architecture, width, looked_at, one_by_one) + 5 * 4 * ROWS * architecture.vocab
    aside = 0
    if one_by_one:
        trained = -(-trained // blocks)
        aside = (4 + width) * TOKENS * architecture.hidden + 4 * trained  # hidden states, and the block as it was
    elif recipe.hidden_weight:
        passing += tokens * (width + 4) * sum(own.hidden for own in architecture.by_block)  # the teacher's, differences
    if recipe.optimiser == "adamw-8bit" and device.type != "cuda":
        aside += STEP_BYTES * max(sizes)
    moments = round(MOMENT_BYTES[recipe.optimiser] * trained)
    models = 4 * (parameters + trained) + moments + copies + dense + aside
    if device.type != "cuda":
        return Needs(LIBRARIES_BYTES + models + passing, 0)
    # Models are read into the memory of the host; states are saved from there.
    return Needs(LIBRARIES_BYTES + CUDA_BYTES + 4 * parameters + moments + dense, CUDA_BYTES // 2 + models + passing)


def _of_a_token(architecture: Architecture, width: int, looked_at: int, one_by_one: bool) -> int:
    """`looked_at`: tokens whose attention weights are kept, where attention makes them: softmax in float32, the product
    before it, and what it is cast to."""
    each = [
        4 * RESIDUALS * own.hidden
        + (4 + 2 * width) * looked_at * sizes.query_heads
        + width * HEADS * columns_of(sizes, own)
        + width * CHANNELS * sizes.channels * own.active_experts
        for own, sizes in zip(architecture.by_block, architecture.blocks, strict=True)
    ]
    if one_by_one:  # judging has two rows of logits
        return max(*each, 2 * width * architecture.vocab)
    return sum(each) + 3 * width * architecture.vocab
