"""Gradients of the loss by the weights of every block, for criteria that ask for them.

They are taken once, on the dense model and before anything is pruned (LLM-Pruner, arXiv 2305.11627, section 3.2: a few
sequences are enough to estimate importance by).

`collect_low_rank` needs no gradient by a whole weight: those of adapters of low rank beside it will do (LoRAPrune,
arXiv 2305.18403), so that a model needs little more memory than to be run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from slimexport.architectures.base import Architecture
from slimexport.errors import BadInputError
from slimexport.pruning.hessian import overflow

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
    ids = _usable(input_ids, max_sequences)
    names = _block_weights(model, architecture)
    wanted = {full for block in names for full in block.values()}
    # The caller may have switched gradients off, in either of torch's two ways.
    with torch.inference_mode(False), torch.enable_grad():
        tensors = _copies(model, wanted, wanted, device, dtype)
        sums = _mean_gradients(model, tensors, {name: tensors[name] for name in wanted}, ids.to(device))
    return [{name: sums[full] for name, full in block.items()} for block in names]


class LowRank(Mapping[str, torch.Tensor]):
    """Gradients by the weights of a block, those of matrices as two factors that are multiplied when asked for."""

    def __init__(self, whole: Mapping[str, torch.Tensor], factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]):
        self._whole, self._factors = whole, factors

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._factors:
            left, right = self._factors[name]
            return left @ right
        return self._whole[name]

    def __iter__(self) -> Iterator[str]:
        yield from (*self._whole, *self._factors)

    def __len__(self) -> int:
        return len(self._whole) + len(self._factors)


def collect_low_rank(
    model: PreTrainedModel,
    architecture: Architecture,
    input_ids: torch.Tensor,
    *,
    rank: int,
    seed: int = 0,
    device: torch.device,
    dtype: torch.dtype | None = None,
    max_sequences: int = MAX_SEQUENCES,
) -> list[LowRank]:
    """What `collect_gradients` gives, of matrices in at most `rank` dimensions, from gradients by adapters alone.

    A matrix W [rows, columns] has an adapter L R beside it, and G is its own gradient. The gradient by L at (0, R) is
    G R^T: with a random R its columns span what G mostly does. With L an orthonormal basis of them and R = 0 the
    gradient by R is L^T G, and LoRAPrune's estimate (dL/dL) R + L (dL/dR) - (dL/dL) (dL/dR) is L L^T G: of all there
    is in those dimensions the nearest to G (the randomised range finder, Halko et al., arXiv 0909.4061, algorithm 4.1),
    and G itself where `rank` is not below its rank. Two passes; what the model computes is not changed by either, as
    LR = 0. What no linear layer holds (biases, experts that are kept in one tensor) has its whole gradient.

    Args and errors are those of `collect_gradients`.
    """
    usable = _usable(input_ids, max_sequences)
    names = _block_weights(model, architecture)
    wanted = {full for block in names for full in block.values()}
    matrices = sorted(full for full in wanted if _of_linear(model, full))
    generator = torch.Generator().manual_seed(seed)
    adapters: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with torch.inference_mode(False), torch.enable_grad():
        ids = usable.to(device)
        tensors = _copies(model, wanted, wanted - set(matrices), device, dtype)
        for full in matrices:
            rows, columns = tensors[full].shape
            width = min(rank, rows, columns)
            right = torch.randn(width, columns, generator=generator).to(tensors[full])
            adapters[full] = (right.new_zeros(rows, width).requires_grad_(), right)
        with _beside(model, adapters):
            by_left = {full: left for full, (left, _) in adapters.items()}
            others = {full: tensors[full] for full in wanted - set(matrices)}
            found = _mean_gradients(model, tensors, by_left | others, ids)
            bases = {full: torch.linalg.qr(found[full].double()).Q.float() for full in matrices}
            for full, (_, right) in adapters.items():
                adapters[full] = (bases[full].to(right), torch.zeros_like(right).requires_grad_())
            by_right = _mean_gradients(model, tensors, {full: right for full, (_, right) in adapters.items()}, ids)
    return [
        LowRank(
            {name: found[full] for name, full in block.items() if full not in bases},
            {name: (bases[full], by_right[full]) for name, full in block.items() if full in bases},
        )
        for block in names
    ]


def _of_linear(model: nn.Module, full: str) -> bool:
    place, _, name = full.rpartition(".")
    module = model.get_submodule(place)
    # One that computes something else (PhiMoE's router) has a weight as any other.
    return name == "weight" and type(module).forward in (nn.Linear.forward, Conv1D.forward)


@contextmanager
def _beside(model: nn.Module, adapters: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Within it the layers of `model` compute with what `adapters` has at the time, added to their weights."""

    def added(full: str, transposed: bool) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            left, right = adapters[full]
            return output + (args[0] @ left @ right if transposed else args[0] @ right.T @ left.T)

        return hook

    handles = []
    for full in adapters:
        module = model.get_submodule(full.rpartition(".")[0])
        handles.append(module.register_forward_hook(added(full, not isinstance(module, nn.Linear))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -------------------------------------------------------------------------------------------------------- what both do


def _usable(input_ids: torch.Tensor, max_sequences: int) -> torch.Tensor:
    ids = input_ids[:max_sequences]
    if not len(ids) or ids.shape[1] < 2:
        raise BadInputError(f"Gradients need sequences of at least two tokens; there are {list(ids.shape)}.")
    return ids


def _block_weights(model: PreTrainedModel, architecture: Architecture) -> list[dict[str, str]]:
    """Of every block: name in the block -> name in the model."""
    parameters = dict(model.named_parameters())
    return [
        {
            w.name: full
            for w in own.block_weights()
            if (full := f"{architecture.family.blocks}.{i}.{w.name}") in parameters
        }
        for i, own in enumerate(architecture.by_block)
    ]


def _copies(
    model: PreTrainedModel, passed: set[str], wanted: set[str], device: torch.device, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Parameters and buffers to call the model with; those in `wanted` require a gradient, and those in `passed` have
    to be such that they can. The model is in evaluation mode afterwards."""
    for name, parameter in model.named_parameters():
        check_differentiable(name, parameter, name in passed)
    model.eval()
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().to(device)
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        tensors[name] = tensor.requires_grad_(name in wanted)
    # Not the precision of the buffers: rotary frequencies stay in float32.
    return tensors | {name: buffer.to(device) for name, buffer in model.named_buffers()}


def _mean_gradients(
    model: PreTrainedModel, tensors: dict[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Of the token NLL by each of `wanted`, over sequences that go through one at a time: float32 on the CPU."""
    order: Sequence[str] = sorted(wanted)
    sums = {name: torch.zeros(wanted[name].shape, dtype=torch.float32) for name in order}
    for sequence in ids.split(1):
        loss = _token_nll(model, tensors, sequence)
        # A router's bias only takes part in the choice, and an expert that was not chosen in nothing.
        found = torch.autograd.grad(loss, [wanted[n] for n in order], allow_unused=True, materialize_grads=True)
        for name, gradient in zip(order, found, strict=True):
            sums[name] += gradient.to("cpu", torch.float32)
    for name, total in sums.items():
        total /= len(ids)
        if not bool(torch.isfinite(total).all()):
            raise BadInputError(f"The gradient of {name} overflows in {overflow(next(iter(tensors.values())).dtype)}.")
    return sums


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
