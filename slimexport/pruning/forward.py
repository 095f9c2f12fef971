"""Running blocks outside their model: hidden states before the first one, what a module inside is given and gives."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slimexport.architectures.base import Architecture
from slimexport.errors import BadInputError
from slimexport.precisions import has_part
from slimexport.pruning.states import ON_THE_DEVICE, HiddenStates, Keeper
from slimexport.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}  # per forward call: enough to keep the matrix units busy

Arguments = Callable[[int, int], dict[str, Any]]
"""(block, batch) -> keyword arguments of that block's forward (mask, position embeddings, ...)."""
Moved = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""id of a tensor -> that tensor, and what it is on the device."""


@dataclass(frozen=True)
class Settings:
    """What the passes through the blocks need of RunConfig."""

    device: torch.device
    dtype: torch.dtype  # of the forward passes
    group_size_start: int | None  # None: as usual for so many channels
    group_size_end: int | None
    damping: float
    refit: float = 0.0  # ridge of the re-fit toward the dense stream; 0: none
    seed: int = 0
    biases: bool = True  # whether what a criterion compensates by a bias is kept
    ranks: Ranks = ALONE  # that share the calibration set
    keep: Keeper = ON_THE_DEVICE  # where what comes by batches lives between the passes
    batch_tokens: int = BATCH_TOKENS["cpu"]  # in a forward call
    in_float32: frozenset[str] = frozenset()  # parts of the names of parameters that are, whatever `dtype` is


_NO_CACHE: dict[str, Any] = {
    "cache": None, "layer_past": None, "past_key_values": None, "past_key_value": None, "use_cache": False
}  # fmt: skip


class _Reached(Exception):
    """Raised by a hook to leave a block as soon as the wanted inputs are there."""


def first_states(
    model: PreTrainedModel,
    architecture: Architecture,
    input_ids: torch.Tensor,
    settings: Settings,
    *,
    whole: bool = False,
) -> tuple[HiddenStates, Arguments]:
    """Hidden states before block 0, and what each block is called with.

    The decoder runs with its blocks replaced by recorders: embedding, masks and rotary tables come from the model's own
    code, whatever the family does there, and no block computes anything. Of several ranks each has every so many of
    the batches, which are smaller where there would be too few.

    Args:
        input_ids: int64 [sequences, length], no padding.
        whole: all sequences in one batch, however many; on every rank.
    """
    ranks = ALONE if whole else settings.ranks
    decoder = model.get_submodule(architecture.family.decoder)
    blocks = list(model.get_submodule(architecture.family.blocks))
    embed = model.get_input_embeddings()
    size = len(input_ids) if whole else max(1, settings.batch_tokens // input_ids.shape[1])
    if ranks.size > 1:
        if len(input_ids) < ranks.size:
            raise BadInputError(f"{len(input_ids)} calibration sequences are too few for {ranks.size} ranks.")
        size = min(size, len(input_ids) // ranks.size)
    states = settings.keep()
    recorded: dict[int, dict[int, dict[str, Any]]] = {}  # batch size -> block -> arguments
    sizes: list[int] = []

    def recorder(index: int, seen: dict[int, dict[str, Any]], moved: Moved) -> Callable[..., Any]:
        signature = inspect.signature(blocks[index].forward)

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if index == 0:
                states.append(hidden_states.to(settings.device))
            given = dict(signature.bind(hidden_states, *args, **kwargs).arguments)
            given.pop(next(iter(given)))  # the hidden states
            given |= given.pop("kwargs", {})
            # Whatever this version of transformers calls its cache: there is none.
            off = {name: value for name, value in _NO_CACHE.items() if name in given}
            seen[index] = {**_to_device(given, settings.device, moved), **off}
            if index + 1 == len(blocks):
                raise _Reached  # what comes after may not take the precision of the blocks
            return (hidden_states, None) if architecture.family.returns_tuple else hidden_states

        return forward

    with torch.no_grad():
        for ids in input_ids.split(size)[ranks.rank :: ranks.size]:
            sizes.append(len(ids))
            seen = recorded[len(ids)] = {}  # no padding: the same for every batch of this size
            moved: Moved = {}  # blocks share masks
            with instead({block: recorder(i, seen, moved) for i, block in enumerate(blocks)}), suppress(_Reached):
                decoder(inputs_embeds=embed(ids.to(embed.weight.device)).to(settings.dtype), use_cache=False)
    return states, lambda index, batch: recorded[sizes[batch]][index]


def working_copy(home: nn.Module, settings: Settings) -> nn.Module:
    """The block in compute precision on the compute device; the block itself where it is that already. As transformers
    would load it: what it keeps in float32, and buffers, are never rounded (routers would choose other experts)."""
    parameter = next(home.parameters())
    if parameter.dtype == settings.dtype and parameter.device == settings.device:
        return home
    made: dict[int, Any] = {}  # each tensor goes where it is to be at once; without a copy of it where it was
    for name, tensor in (*home.named_parameters(), *home.named_buffers()):
        dtype = settings.dtype if tensor.is_floating_point() else tensor.dtype
        if has_part(name, settings.in_float32) or not isinstance(tensor, nn.Parameter):
            dtype = torch.promote_types(tensor.dtype, dtype)
        there = tensor.detach().to(settings.device, dtype, non_blocking=True)
        there = there.clone() if there.data_ptr() == tensor.data_ptr() else there
        made[id(tensor)] = nn.Parameter(there, requires_grad=False) if isinstance(tensor, nn.Parameter) else there
    return copy.deepcopy(home, made)


def output(result: Any) -> torch.Tensor:
    """The hidden states of what a block returned."""
    return result[0] if isinstance(result, tuple) else result


def advance(states: HiddenStates, index: int, block: nn.Module, arguments: Arguments) -> None:
    """Each batch becomes what the block of this number gives for it."""
    for batch in range(len(states)):
        states[batch] = output(block(states[batch], **arguments(index, batch)))


def inputs_of(block: nn.Module, name: str, states: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """What module `name` of `block` is given for `states`; the forward pass ends there."""
    return given_to(block, name, states, arguments)[0]


def given_to(block: nn.Module, name: str, states: torch.Tensor, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """As `inputs_of`, with all arguments: experts are given what the router says too."""
    found: list[tuple[torch.Tensor, ...]] = []

    def reached(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found.append(args)
        raise _Reached

    handle = block.get_submodule(name).register_forward_pre_hook(reached)
    try:
        block(states, **arguments)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise RuntimeError(f"module {name} was never called")


@dataclass(frozen=True)
class Watched:
    """One whole pass through a block: its output, and what the watched modules were given and gave, by name."""

    output: torch.Tensor
    inputs: dict[str, tuple[torch.Tensor, ...]]
    outputs: dict[str, torch.Tensor]


def watch(block: nn.Module, names: Sequence[str], states: torch.Tensor, arguments: dict[str, Any]) -> Watched:
    """Runs `block` on `states` and notes inputs and outputs of its modules `names`."""
    given: dict[str, tuple[torch.Tensor, ...]] = {}
    gave: dict[str, torch.Tensor] = {}

    def noted(name: str) -> Callable[..., torch.Tensor]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], result: torch.Tensor) -> torch.Tensor:
            given[name], gave[name] = args, result
            return result.clone()  # Falcon adds to it in place

        return hook

    handles = [block.get_submodule(name).register_forward_hook(noted(name)) for name in names]
    try:
        return Watched(output(block(states, **arguments)), given, gave)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def known_attention(
    block: nn.Module, architecture: Architecture, inputs: HiddenStates | None, batch: int
) -> Iterator[None]:
    """Within it, the attention of `block` is o_proj on inputs already known: heads do not see each other, so removing
    some leaves the others' outputs as they were, and softmax(QK)V need not be computed a second time."""
    if inputs is None:
        yield
        return
    attention = block.get_submodule(architecture.family.attention)
    project = block.get_submodule(architecture.family.attention_output)
    with instead({attention: lambda *args, **kwargs: (project(inputs[batch]), None)}):
        yield


@contextmanager
def instead(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within it, these modules compute these functions."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def _to_device(value: Any, device: torch.device, moved: Moved) -> Any:
    """A tensor that came before is the same one there (`moved`, with which it lives), and one that repeats a sequence's
    entries for all of a batch goes on doing so."""
    if isinstance(value, torch.Tensor):
        if id(value) not in moved:
            repeats = value.dim() > 1 and len(value) > 1 and value.stride(0) == 0
            there = value[:1].to(device).expand(value.shape) if repeats else value.to(device)
            moved[id(value)] = (value, there)
        return moved[id(value)][1]
    if isinstance(value, dict):
        return {k: _to_device(v, device, moved) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to_device(v, device, moved) for v in value)
    return value
