"""How long pruning will take, counted from sizes, at a rate measured on this machine."""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING

from slimexport.architectures.base import Architecture
from slimexport.architectures.weights import LATENT_QUERY, QUERY
from slimexport.artifacts import BlockSizes, PruningCost, PruningPlan
from slimexport.pruning import factor
from slimexport.pruning.grid import COST_SEQUENCES, POSITIONS, PROBED_SHARES
from slimexport.pruning.inverse import SINGLE_FROM
from slimexport.pruning.memory import calibrated_tokens, columns_of, computed_in, fitting, measures_costs

if TYPE_CHECKING:
    import torch

    from slimexport.config import RunConfig

# Large matrix products run at the measured rate, but for what goes with them (norms, softmax, slicing). Factors and
# eliminations move as much as they compute. Both as found for 1.1 B parameters on two cores (benchmarks/scale.py).
OVERHEAD, SOLVING = 1.15, 2.0
# Reading, checking and hashing the model, writing it twice, reloading it in a fresh process; found there as well.
STARTING, PER_BYTE = 8.0, 8e-9


def with_cost(
    plan: PruningPlan, architecture: Architecture, config: RunConfig, *, streamed: bool = False
) -> PruningPlan:
    """`plan` with an estimate of the prune stage's time and peak memory; takes about a second to measure the rate.

    `streamed`: blocks come from disk one after the other. Raises BadInputError for limits that cannot be kept.
    """
    from slimexport.loading import resolve_device
    from slimexport.pruning.stage import weighs_errors

    device = resolve_device(config.device)
    tokens = calibrated_tokens(config)
    needs = fitting(plan, architecture, config, device, streamed=streamed)
    work = counted(plan, architecture, tokens, config.sequence_length)
    if plan.blocks != plan.dense:
        if weighs_errors(config):
            measured = min(config.resolved_curvature_tokens, tokens)
            work += _curvature_operations(plan, architecture, measured)
        if config.resolved_refit:
            work += _refit_operations(plan, architecture, tokens, config.sequence_length)
        if measures_costs(config):
            work += _measuring_operations(architecture, tokens, config)
    rates = _measure(device, computed_in(plan, config, device))
    cost = PruningCost(
        seconds=round(
            STARTING
            + PER_BYTE * plan.dense_estimates.bytes
            + OVERHEAD * (work.passes / rates.passes + work.moments / rates.single)
            + SOLVING * (work.solves / rates.single + work.solves_in_double / rates.double),
            1,
        ),
        peak_memory_bytes=needs.host,
        peak_device_memory_bytes=needs.device,
        disk_bytes=needs.disk,
        hidden_states=needs.place,
        flops=work.total,
        flops_per_second=rates.passes,
        device=str(device),
    )
    return replace(plan, cost=cost)


@dataclass(frozen=True)
class Operations:
    """FLOPs, by the precision that they are done in: the forward passes' own; float32 (H; factors, inverses and
    eliminations of wide matrices); and float64 (those of others)."""

    passes: float = 0.0
    moments: float = 0.0
    solves: float = 0.0
    solves_in_double: float = 0.0

    @property
    def total(self) -> float:
        return sum(astuple(self))

    def __add__(self, other: Operations) -> Operations:
        return Operations(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def times(self, count: int) -> Operations:
        return Operations(*(count * value for value in astuple(self)))


def counted(plan: PruningPlan, architecture: Architecture, tokens: int, length: int) -> Operations:
    """Of the passes of `tokens` in sequences of `length` through the blocks, of H and of what is solved by it."""
    passes, moments, solves = 0.0, 0.0, Operations()
    hidden = architecture.hidden
    for own, dense, kept in zip(architecture.by_block, plan.dense, plan.blocks, strict=True):
        heads, channels = columns_of(dense, own), dense.channels
        scores = 2 * tokens * length * _scored(dense, own)  # causal: half of QK^T and of PV
        if (dense.kv_groups, dense.heads_per_group) != (kept.kv_groups, kept.heads_per_group):
            passes += 2 * tokens * own.attention_parameters(dense) + scores
            moments += tokens * heads**2
            solves += _solve(heads, hidden, heads - kept.query_heads * architecture.head_dim)
        if channels != kept.channels:
            # A token goes to some of the experts, and each of these has an H of its own.
            active = architecture.active_experts
            passes += 2 * tokens * _channel_parameters(own) * channels
            moments += tokens * active * channels**2
            solves += _solve(channels, hidden, channels - kept.channels).times(architecture.experts)
        passes += 2 * tokens * _passed(own, kept) + scores
    return Operations(passes, moments) + solves


def _channel_parameters(architecture: Architecture) -> float:
    """Of one channel, that a token meets."""
    return architecture.channel_parameters() * architecture.active_experts / architecture.experts


def _passed(architecture: Architecture, sizes: BlockSizes) -> float:
    """Matrix entries of a block that a token meets."""
    met = architecture.attention_parameters(sizes) + sizes.channels * _channel_parameters(architecture)
    return met + architecture.left_dense_parameters(sizes)


def _refit_operations(plan: PruningPlan, architecture: Architecture, tokens: int, length: int) -> Operations:
    """Of the dense stream, of what it is compared with, and of what is missing times the inputs; and those of fitting
    what makes the FFN's inputs."""
    single = double = 0.0
    for own, dense in zip(architecture.by_block, plan.dense, strict=True):
        inputs = columns_of(dense, own) + dense.channels
        attention = 2 * tokens * length * columns_of(dense, own)
        single += 2 * tokens * (_passed(own, dense) + 2 * own.hidden * inputs) + attention
    if parts := len(architecture.family.ffn_factors):
        fitted = min(tokens, factor.TOKENS)
        for kept in plan.blocks:
            matrix = kept.channels * architecture.hidden
            # Forward, what is missing, and every step forwards and, but for the last, backwards; then the moments.
            single += 2 * fitted * matrix * (parts + 1) * (1 + 2 * factor.STEPS)
            single += 2 * fitted / factor.EVERY * (parts * kept.channels**2 + architecture.hidden**2)
            double += 2 * (parts * kept.channels**3 + architecture.hidden**3)
            double += 2 * factor.STEPS * parts * matrix * (kept.channels + architecture.hidden)
    return Operations(single, 0.0, 0.0, double)


def _curvature_operations(plan: PruningPlan, architecture: Architecture, tokens: int) -> Operations:
    """Of the passes forwards, forwards again and backwards through blocks and head, and of the moments; of two Cholesky
    factors a block in float64 and of what they multiply, there and back; and of the errors of what was chosen by others
    than its own."""
    hidden = architecture.hidden
    each = list(zip(architecture.by_block, plan.dense, strict=True))
    blocks = sum(_passed(own, dense) + 2 * hidden**2 / 3 for own, dense in each)
    columns = sum(columns_of(dense, own) + dense.channels for own, dense in each)
    double = 2 * len(plan.dense) * hidden**3 / 3 + 2 * hidden**2 * columns
    gone = 0
    for own, dense, kept in zip(architecture.by_block, plan.dense, plan.blocks, strict=True):
        gone += columns_of(dense, own) * (columns_of(dense, own) - columns_of(kept, own))
        gone += architecture.experts * dense.channels * (dense.channels - kept.channels)
    return Operations(6 * tokens * blocks + 4 * tokens * architecture.vocab * hidden, 0.0, 2 * hidden * gone, double)


def _measuring_operations(architecture: Architecture, tokens: int, config: RunConfig) -> Operations:
    """Of measuring costs."""
    single, moments, solves = 0.0, 0.0, Operations()
    probes = min(config.probe_tokens, tokens)
    known = min(tokens, COST_SEQUENCES * config.sequence_length)
    each = 2 * len(PROBED_SHARES)  # candidates that every block adds, and as many that go through all
    for index, (own, dense) in enumerate(zip(architecture.by_block, architecture.blocks, strict=True)):
        heads = columns_of(dense, own)
        passed = known + probes * (1 + each * (index + 2))
        single += 2 * passed * (_passed(own, dense) + config.sequence_length * _scored(dense, own))
        moments += known * (heads**2 + architecture.active_experts * dense.channels**2)
        solves += _solve(heads, architecture.hidden, heads)
        solves += _solve(dense.channels, architecture.hidden, dense.channels).times(architecture.experts)
    candidates = each * (len(architecture.blocks) + 1) + 1
    single += 2 * candidates * probes / POSITIONS * architecture.vocab * architecture.hidden
    return Operations(single, moments) + solves


def _solve(n: int, out: int, removed: int) -> Operations:
    """Of Cholesky and inverse of H, of the eliminations and of the errors, in float32 or in float64 by the number of
    inputs."""
    flops = n**3 + removed * n * (removed + 2 * out) + out * ((n - removed) ** 2 + removed**2)
    return Operations(solves=flops) if n >= SINGLE_FROM else Operations(solves_in_double=flops)


def _scored(sizes: BlockSizes, own: Architecture) -> float:
    """Entries of a token's queries and values, on average of both: they differ with latents."""
    widths = own.query_axes
    return columns_of(sizes, own) * (widths.get(LATENT_QUERY, widths[QUERY]) / widths[QUERY] + 1) / 2


@dataclass(frozen=True)
class Rates:
    """FLOP/s: of the forward passes, in float32, in float64."""

    passes: float
    single: float
    double: float


def _measure(device: torch.device, passes: torch.dtype) -> Rates:
    """Of a square product, the best of a few."""
    import torch

    size = 1024 if device.type == "cpu" else 4096
    found = {}
    for dtype in dict.fromkeys((passes, torch.float32, torch.float64)):
        a = torch.randn(size, size, dtype=dtype, device=device)
        best = float("inf")
        for _ in range(6):
            start = time.perf_counter()
            (a @ a).sum().item()  # item() waits for the device
            best = min(best, time.perf_counter() - start)
        found[dtype] = 2 * size**3 / best
    return Rates(found[passes], found[torch.float32], found[torch.float64])
