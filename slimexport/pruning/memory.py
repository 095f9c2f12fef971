"""What memory pruning will take, counted from sizes, and where hidden states are to live so that it keeps a limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from slimexport.architectures.base import Architecture
from slimexport.artifacts import BlockSizes, PruningPlan
from slimexport.errors import BadInputError
from slimexport.machine.memory import free_bytes
from slimexport.pruning import factor, hessian, readout
from slimexport.pruning.forward import BATCH_TOKENS
from slimexport.pruning.grid import (
    COST_SEQUENCES,
    POSITIONS,
    PROBE_LENGTH,
    PROBED_SHARES,
    SEARCHED_CHANNELS,
    SEARCHED_HEADS,
)
from slimexport.pruning.inverse import SINGLE_FROM
from slimexport.pruning.states import Place
from slimexport.ranks import beside

if TYPE_CHECKING:
    import torch

    from slimexport.config import RunConfig

LIBRARIES_BYTES = 600_000_000  # interpreter with torch and transformers loaded
CUDA_BYTES = 1_000_000_000  # of a process that has opened a CUDA device: its libraries, and the context on the device


@dataclass(frozen=True)
class Needs:
    """Peaks in bytes, with the hidden states in `place`."""

    place: Place
    host: int  # of the process, with its libraries
    device: int  # of the CUDA device; 0 without one
    disk: int


def fitting(
    plan: PruningPlan,
    architecture: Architecture,
    config: RunConfig,
    device: torch.device,
    *,
    streamed: bool,
    ranks: int = 1,
) -> Needs:
    """What pruning needs, with the hidden states as near as the limits of `config` allow; without a limit, what is free
    now counts, and is never a reason to refuse.

    Raises BadInputError where no place keeps the limits, with what would.
    """
    places: tuple[Place, ...] = ("device", "file") if device.type == "cpu" else ("device", "host", "file")
    tried = [needs(plan, architecture, config, device, place, streamed=streamed, ranks=ranks) for place in places]
    free_host, free_device = free_bytes(device)
    free_host //= beside()
    asked_host, asked_device = config.memory_limit, config.device_memory_limit
    for found in tried:
        if found.host <= (asked_host or free_host) and found.device <= (asked_device or free_device):
            return found
    for flag, limit, of in (("max-memory", asked_host, "host"), ("max-device-memory", asked_device, "device")):
        least = min(getattr(found, of) for found in tried)
        if limit is not None and least > limit:
            why = why_whole(config) or "this model cannot be read block by block"
            more = "" if streamed or of == "device" else f" ({why})"
            raise BadInputError(
                f"Pruning needs {least / 1e9:.2f} GB of {'device ' if of == 'device' else ''}memory even with hidden "
                f"states {'in a file' if of == 'host' else 'off the device'}{more}: "
                f"--{flag} {limit / 1e9:.2f} GB cannot be kept."
            )
    kept = [f for f in tried if f.host <= (asked_host or math.inf) and f.device <= (asked_device or math.inf)]
    if not kept:  # each limit could be kept alone
        least = min(tried, key=lambda found: found.host)
        raise BadInputError(
            f"Both limits cannot be kept: with hidden states {_where(least.place)} pruning needs "
            f"{least.host / 1e9:.2f} GB of memory and {least.device / 1e9:.2f} GB of device memory."
        )
    return min(kept, key=lambda found: (found.device, found.host))


def why_whole(config: RunConfig) -> str | None:
    """What keeps pruning from having one block after the other in memory, where `config` has such; None: nothing."""
    from slimexport.pruning.stage import wants_biases
    from slimexport.texts import mix

    if _gradients_of(config.criterion) or wants_biases(config):
        return f"criterion {config.criterion} needs the model as a whole"
    return "a model that writes text to calibrate on is needed as a whole" if mix.writes(config.calibration) else None


def _gradients_of(criterion: str) -> Literal["all", "low rank"] | None:
    """Which gradients it asks for."""
    from slimexport.pruning.criteria import registry as criteria

    found = criteria.get(criterion)
    if not getattr(found, "needs_gradients", False):
        return None
    return "all" if getattr(found, "gradient_rank", None) is None else "low rank"


def needs(
    plan: PruningPlan,
    architecture: Architecture,
    config: RunConfig,
    device: torch.device,
    place: Place,
    *,
    streamed: bool,
    ranks: int = 1,
) -> Needs:
    """`streamed`: blocks come from disk one after the other; `ranks`: processes that share the calibration set."""
    from slimexport.pruning.stage import weighs_errors

    cuda = device.type == "cuda"
    weights, copies = _weights(plan, architecture, config, streamed, device)
    held = computing = curvature = reading = supernet = gradients = 0
    if plan.blocks != plan.dense:
        tokens = calibrated_tokens(config)
        own = -(-tokens // ranks)
        batch = min(own, max(BATCH_TOKENS[device.type], config.sequence_length))
        width = computed_in(plan, config, device).itemsize
        out, blocks = architecture.hidden, len(plan.blocks)
        probes, length = min(config.probe_tokens, tokens), config.sequence_length
        phases = [_pruning(plan, architecture, config, own, batch, width)]
        vocab = 4 * architecture.vocab
        # The head in float32, and logits with their softmax, on the host.
        head = 0 if _stored(plan) == 4 else vocab * out
        if config.resolved_refit:
            reading = max(reading, head + 4 * vocab * readout.MOST_TOKENS // POSITIONS)
        if weighs_errors(config):
            curvature = 2 * 4 * blocks * out**2
            measured = min(config.resolved_curvature_tokens, tokens)
            backwards = 3 * _batch(plan, architecture, min(measured, BATCH_TOKENS[device.type]), width, length)
            phases.append((width * measured * out * (blocks + 2), backwards))
            reading = max(reading, head + 4 * vocab * min(length, PROBE_LENGTH))
        if measures_costs(config):
            candidates = 2 * len(PROBED_SHARES) * (blocks + 1) + 1
            seen = min(tokens, COST_SEQUENCES * length)
            passed = _batch(plan, architecture, max(min(seen, batch), probes), width, length)
            columns, channels = _widest(plan, architecture)
            cuts = 4 * out * (len(PROBED_SHARES) * (columns + channels)) * 2 // 3
            if config.resolved_allocation == "search":
                cuts = 4 * out * (SEARCHED_HEADS * columns + SEARCHED_CHANNELS * channels) * 2 // 3
                supernet = blocks * cuts * _stored(plan) // 4
            solving = cuts + _solving(plan, architecture, passed, True)
            phases.append((width * out * (candidates * probes + seen), solving))
            reading = max(reading, head + 4 * vocab * probes // POSITIONS)
        # A batch of what is elsewhere is here while it is computed with, before and after.
        here = 0 if place == "device" else 2 * width * batch * (out + _widest(plan, architecture)[0])
        computing = here + max(work + (of if place == "device" else 0) for of, work in phases)
        if not cuda:  # one after the other
            computing, reading = max(computing, reading + (phases[-1][0] if place == "device" else 0)), 0
        held = max(of for of, _ in phases)
        gradients, measuring = _measuring_gradients(plan, architecture, config, width, device)
        computing = max(computing, measuring)
    on_host = (curvature if place != "file" else 0) + (held if place == "host" else 0)
    host = (
        LIBRARIES_BYTES
        + weights
        + gradients
        + on_host
        + ((CUDA_BYTES + copies + reading) if cuda else (copies + computing))
    )
    shrunk = plan.estimates.bytes
    return Needs(
        place=place,
        host=host,
        device=(CUDA_BYTES // 2 + copies + computing) if cuda else 0,
        disk=2 * shrunk + supernet + (held + curvature if place == "file" else 0),
    )


def _where(place: Place) -> str:
    return {"device": "on the device", "host": "in the memory of the host", "file": "in a file"}[place]


def _measuring_gradients(
    plan: PruningPlan, architecture: Architecture, config: RunConfig, width: int, device: torch.device
) -> tuple[int, int]:
    """Their sums, which stay on the host, and what is computed with until they are there: the whole model on its
    device, and a sequence's way back through all blocks."""
    kind = _gradients_of(plan.criterion)
    if kind is None:
        return 0, 0
    blocks = _block_parameters(plan, architecture)
    # Experts that are kept in one tensor take no adapters.
    whole = sum(blocks) if kind == "all" or architecture.experts > 1 else 0
    moved = width * plan.dense_estimates.parameters if device.type == "cuda" or width != _stored(plan) else 0
    length = config.sequence_length
    backwards = len(blocks) * _batch(plan, architecture, length, width, length)
    return 4 * whole, moved + width * whole + backwards


def _block_parameters(plan: PruningPlan, architecture: Architecture) -> list[int]:
    return [sum(map(math.prod, own.block_shapes(sizes).values()))
            for own, sizes in zip(architecture.by_block, plan.dense, strict=True)]  # fmt: skip


def _pruning(
    plan: PruningPlan, architecture: Architecture, config: RunConfig, tokens: int, batch: int, width: int
) -> tuple[int, int]:
    """While blocks are pruned: hidden states and the inputs of one block's heads, with a re-fit the dense stream and
    what it adds in one block; and what is computed with."""
    columns, channels = _widest(plan, architecture)
    out, refit = architecture.hidden, bool(config.resolved_refit)
    held = width * tokens * (out + columns + (4 * out if refit else 0))
    work = _solving(plan, architecture, _batch(plan, architecture, batch, width, config.sequence_length), refit)
    parts = len(architecture.family.ffn_factors)
    if refit and parts:
        kept = max(b.channels for b in plan.blocks)
        # In float64, of each projection: the preconditioner with its inverse, and what conjugate gradients go by.
        work = max(work, parts * (21 * kept**2 + 54 * kept * out))
        work += 4 * min(tokens, factor.TOKENS) * (3 * out + parts * kept)
    # All experts of a block are looked at together, and then solved one by one.
    return held, work + (architecture.experts - 1) * 8 * channels**2


def _batch(plan: PruningPlan, architecture: Architecture, tokens: int, width: int, length: int) -> int:
    """A batch on its way through the FFN, or, where attention weights are in memory (the softmax in float32), through
    attention; `length`: of its sequences."""
    channels = _widest(plan, architecture)[1]
    ffn = width * 3 * channels * architecture.active_experts
    heads = max(block.query_heads for block in plan.dense) if architecture.family.eager else 0
    return tokens * (width * 4 * architecture.hidden + max(ffn, (2 * width + 4) * heads * min(length, tokens)))


def _solving(plan: PruningPlan, architecture: Architecture, batch: int, double: bool) -> int:
    """The largest of what comes after each other: a batch while H is added up, H with its inverse, the matrix while
    columns go. `double`: in float64 however wide (a re-fit's system is)."""
    widest, out = max(_widest(plan, architecture)), architecture.hidden
    removed = max(dense.channels - kept.channels for dense, kept in zip(plan.dense, plan.blocks, strict=True))
    item = 8 if widest < SINGLE_FROM else 4
    cross = 8 * out * widest if double else 0  # what a re-fit's targets are with the inputs
    return max(
        8 * widest**2
        + 4 * hessian.ROWS * widest
        + cross
        + batch,  # H in float64, and of a batch's part of it some rows
        (32 if double else 16) * widest**2 + 8 * out * widest,  # 16 also where float32 was not accurate enough
        # W as it came, as it changes, what becomes of it, and that again without what went.
        (8 + item) * widest**2 + (8 * out + 4 * item * out + item * removed) * widest + cross,
    )


def _widest(plan: PruningPlan, architecture: Architecture) -> tuple[int, int]:
    """Inputs of o_proj and of down_proj, at most."""
    columns = [columns_of(b, own) for own, b in zip(architecture.by_block, plan.dense, strict=True)]
    return max(columns), max(b.channels for b in plan.dense)


def columns_of(sizes: BlockSizes, own: Architecture) -> int:
    """Inputs of o_proj; none in a block without heads."""
    return sizes.query_heads * own.head_dim if own.has_heads else 0


def calibrated_tokens(config: RunConfig) -> int:
    """In whole sequences."""
    return max(1, config.calibration_tokens // config.sequence_length) * config.sequence_length


def measures_costs(config: RunConfig) -> bool:
    """Whether the plan waits for costs that are not known yet."""
    known = config.costs is not None and config.costs.exists()
    return config.resolved_allocation in ("sensitivity", "search") and not known


def computed_in(plan: PruningPlan, config: RunConfig, device: torch.device) -> torch.dtype:
    """The precision of the forward passes, as far as the plan says what is stored: it knows sizes alone."""
    import torch

    from slimexport.pruning.stage import compute_dtype

    return compute_dtype(config, device, torch.float32 if _stored(plan) == 4 else torch.bfloat16)


def _stored(plan: PruningPlan) -> int:
    return plan.dense_estimates.bytes // plan.dense_estimates.parameters


def _weights(
    plan: PruningPlan, architecture: Architecture, config: RunConfig, streamed: bool, device: torch.device
) -> tuple[int, int]:
    """Bytes as stored: of the whole model, or of what is in no block and of three blocks, the one that is pruned, what
    it becomes, and the next one, which is read meanwhile. And of the copies to compute with, of a block as it is and as
    it becomes, where those are on a device or in another precision."""
    dense, each = plan.dense_estimates, _stored(plan)
    blocks = _block_parameters(plan, architecture)
    width = computed_in(plan, config, device).itemsize
    copies = 2 * width * max(blocks) if device.type == "cuda" else (0 if each == width else width * max(blocks))
    if not streamed:
        return dense.bytes, copies
    return each * (dense.parameters - sum(blocks) + 3 * max(blocks)), copies
