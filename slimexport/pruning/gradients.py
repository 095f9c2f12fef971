"""Gradients of the loss by the weights of every block, for criteria that ask for them.

They are taken once, on the dense model and before anything is pruned (LLM-Pruner, arXiv 2305.11627, section 3.2: a few
sequences are enough to estimate importance by).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.func import functional_call

from slimexport.architectures.base import Architecture
from slimexport.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_SEQUENCES = 16  # the paper takes ten, and shorter ones


def collect_gradients(
    model: PreTrainedModel,
    architecture: Architecture,
    input_ids: torch.Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    max_sequences: int = MAX_SEQUENCES,
) -> list[dict[str, torch.Tensor]]:
    """Mean gradient of the token NLL (nats) over calibration sequences, by every weight of every block.

    One sequence at a time goes through the whole model, forward and backward, so that all gradients of the block
    weights are in memory together, once in `dtype` and once as the float32 sum. The model is switched to evaluation
    mode and otherwise left as it is: what is differentiated are copies of its parameters, or, where neither device nor
    precision changes, views of them.

    Args:
        input_ids: int64 [sequences, length], no padding; the first `max_sequences` are used.
        device: where it is computed.
        dtype: of the computation; None for the precision that each parameter is stored in.

    Returns:
        One dict a block: name of the weight relative to the block -> float32 [shape of the weight] on the CPU.

    Raises:
        BadInputError: weights that cannot be differentiated, no token to predict, or an overflow.
    """
    ids = input_ids[:max_sequences]
    if not len(ids) or ids.shape[1] < 2:
        raise BadInputError(f"Gradients need sequences of at least two tokens; there are {list(ids.shape)}.")
    parameters = dict(model.named_parameters())
    names = [
        {
            w.name: full
            for w in own.block_weights()
            if (full := f"{architecture.family.blocks}.{i}.{w.name}") in parameters
        }
        for i, own in enumerate(architecture.by_block)
    ]
    wanted = {full for block in names for full in block.values()}
    for name, parameter in model.named_parameters():
        check_differentiable(name, parameter, name in wanted)
    model.eval()

    # The caller may have switched gradients off, in either of torch's two ways.
    with torch.inference_mode(False), torch.enable_grad():
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            tensor = parameter.detach().to(device)
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            tensors[name] = tensor.requires_grad_(name in wanted)
        # Not the precision of the buffers: rotary frequencies stay in float32.
        tensors |= {name: buffer.to(device) for name, buffer in model.named_buffers()}
        order = sorted(wanted)
        sums = {name: torch.zeros(tensors[name].shape, dtype=torch.float32) for name in order}
        for sequence in ids.to(device).split(1):
            loss = _token_nll(model, tensors, sequence)
            # A router's bias only takes part in the choice, and an expert that was not chosen in nothing.
            found = torch.autograd.grad(loss, [tensors[n] for n in order], allow_unused=True, materialize_grads=True)
            for name, gradient in zip(order, found, strict=True):
                sums[name] += gradient.to("cpu", torch.float32)
    for name, total in sums.items():
        total /= len(ids)
        if not bool(torch.isfinite(total).all()):
            raise BadInputError(f"The gradient of {name} overflows; use --dtype float32 (or bfloat16).")
    return [{name: sums[full] for name, full in block.items()} for block in names]


def check_differentiable(name: str, parameter: nn.Parameter, wanted: bool) -> None:
    """Raises BadInputError where autograd cannot pass through `parameter`, or cannot go to it where that is wanted."""
    if wanted and not parameter.is_floating_point():
        kind = str(parameter.dtype).removeprefix("torch.")
        raise BadInputError(f"{name} is stored as {kind}, which has no gradient: use a model with float weights.")
    if parameter.is_inference():
        raise BadInputError(
            f"{name} was made under torch.inference_mode() and has no gradient: load the model outside of it."
        )


def _token_nll(model: PreTrainedModel, tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Mean NLL of the tokens after the first: ids [1, length]."""
    output = functional_call(model, tensors, kwargs={"input_ids": ids, "use_cache": False})
    logits = output.logits[0, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, ids[0, 1:])
