"""TTFT, TPOT (the mean ITL of one run) and ITL of the exported graphs, shrunk and baseline interleaved in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimexport.artifacts import Estimates, Figure, is_quantised
from slimexport.machine import huge_pages, rates
from slimexport.providers import PROVIDERS
from slimexport.runtime import Decoder
from slimexport.runtime.base import Bits
from slimexport.verification import interleaved
from slimexport.verification.intervals import paired_figure, rounded
from slimexport.verification.shortfall import shortfall

DECODE_PROMPT = 128  # tokens before the decoded ones
PERCENTILES = (50, 90, 99)
# Of a weight, and of one of lm_head.
BITS = {
    "fp32": (32, 32),
    "fp16": (16, 16),
    "bf16": (16, 16),
    "int8": (8, 8),
    "int4": (4, 4),
    "int4-mixed": (4, 8),
}

Progress = Callable[[int, int], None]
"""Called with rounds done and rounds in all."""


@dataclass(frozen=True)
class Latency:
    """`details` holds every time that was measured, so that the figures can be recomputed."""

    figures: tuple[Figure, ...]
    details: dict[str, Any]
    notes: tuple[str, ...]


@dataclass
class _Times:
    """Seconds of one model: TTFT [length][round], ITL [round][token]."""

    ttft: dict[int, list[float]]
    itl: list[list[float]]


@dataclass(frozen=True)
class _Ideals:
    """Ratios that the removed FLOPs (by prompt length) and the removed bytes would give; milliseconds that the shrunk
    model would take if this machine did nothing but multiply, or read."""

    prefill: dict[int, float]
    decode: float | None
    prefill_floor: dict[int, float] = field(default_factory=dict)  # ms
    decode_floor: float | None = None  # ms


def measure_latency(
    shrunk: Decoder,
    baseline: Decoder | None,
    text: NDArray[np.int64],
    *,
    prompt_lengths: Sequence[int],
    decode_tokens: int,
    runs: int,
    seed: int,
    shrunk_estimates: Estimates | None = None,
    baseline_estimates: Estimates | None = None,
    progress: Progress | None = None,
    enough: Callable[[Latency], bool] | None = None,
    at_most: int = 0,
) -> Latency:
    """Measures `runs` rounds after the warm-up (`interleaved.py`), and more until they are `enough`, `at_most` in all.

    Within a round every measurement is made on both models back to back, on the same prompt (a stretch of `text` int64
    [n], chosen by `seed`, another one each round); which model goes first alternates. On a machine that had other work
    to do nothing counts: every figure is invalid then. Prompts that do not fit the
    model's positions are left out, with a note. The ratios' `ideal` follows from the estimates, where given.
    """
    if runs == 0:
        return Latency((), {}, ("Latency, load time and peak memory were not measured (latency_runs is 0).",))
    decoders = {"shrunk": shrunk} if baseline is None else {"shrunk": shrunk, "baseline": baseline}
    positions = min((d.max_positions for d in decoders.values() if d.max_positions is not None), default=10**9)
    lengths = [length for length in prompt_lengths if length <= positions]
    prompt_tokens = min(DECODE_PROMPT, positions - decode_tokens)
    notes = [
        f"Prompts of {n} tokens do not fit the model's {positions} positions." for n in prompt_lengths if n > positions
    ]
    if prompt_tokens < 1:
        notes.append(f"Decoding {decode_tokens} tokens does not fit the model's {positions} positions.")
    huge = 0
    if shrunk.provider == "cpu" and (huge := huge_pages.ask()):
        notes.append(
            f"Latency: {huge / 1e6:.0f} MB of this process are in memory pages of 2 MB, or the model that is "
            "opened first would be slower; processes with other settings differ by some percent (docs/speed.md)."
        )
    rng = np.random.default_rng(seed)
    pasts = (prompt_tokens,) if prompt_tokens >= 1 else ()
    ideals = _Ideals({}, None)
    if any(d.artifact and d.artifact.float_bytes for d in decoders.values()):
        notes.append("No ideals and floors: some weights are not quantised, and what is read follows from no size.")
        shrunk_estimates = None
    if shrunk_estimates and shrunk.provider == "cpu":
        ideals = _floors(shrunk, shrunk_estimates, lengths, prompt_tokens + (decode_tokens - 1) / 2)
    if baseline and shrunk_estimates and baseline_estimates:
        flops = {length: _prefill_flops(shrunk, shrunk_estimates, length) for length in lengths}
        dense = {length: _prefill_flops(baseline, baseline_estimates, length) for length in lengths}
        context = prompt_tokens + (decode_tokens - 1) / 2
        precision = shrunk.precision
        half = PROVIDERS[shrunk.provider].device == "cuda"
        streamed = decode_bytes(shrunk_estimates, context, precision, half=half, bits=shrunk.bits) / decode_bytes(
            baseline_estimates, context, precision, half=half, bits=baseline.bits
        )
        ideals = replace(ideals, prefill={n: flops[n] / dense[n] for n in lengths}, decode=streamed)
    operators = sum(count for of in shrunk.placement.values() for count in of.values())
    known = {
        "threads": shrunk.threads,
        "provider": shrunk.provider,
        "batch": 1,
        "huge_page_bytes": huge,
        "decode_prompt_tokens": prompt_tokens,
        "decode_tokens": decode_tokens,
    }

    def made(samples: interleaved.Samples) -> Latency:
        return _latency(samples, lengths, pasts, ideals, operators, known, tuple(notes))

    samples = interleaved.measure(
        decoders,
        interleaved.Quantities(tuple(lengths), pasts, decode_tokens),
        lambda length: _stretch(text, length, rng),
        rounds=runs,
        threads=shrunk.threads,
        progress=progress,
        enough=(lambda found: enough(made(found))) if enough else None,
        at_most=at_most,
        on_cpu=shrunk.provider == "cpu",
    )
    return made(samples)


def _latency(
    samples: interleaved.Samples,
    lengths: Sequence[int],
    pasts: Sequence[int],
    ideals: _Ideals,
    operators: int,
    known: Mapping[str, Any],
    notes: tuple[str, ...],
) -> Latency:
    """Figures and record of what was measured. `operators` of a graph are called at every step."""
    times = {
        name: _Times(of, [run for past in pasts for run in samples.itl[name][past]])
        for name, of in samples.ttft.items()
    }
    figures = (*_figures(times, ideals), *_energy_figures(samples, pasts))
    if samples.busy:
        notes = (*notes, f"No time counts: {samples.busy}.")
        figures = tuple(replace(figure, valid=False, note=samples.busy) for figure in figures)
    explained = [f for f in figures if f.name == "decode.tpot_ms" or f.name.startswith("prefill.")]
    notes = (*notes, *(why for figure in explained if (why := shortfall(figure, operators))))
    details = {
        "runs": len(samples.orders),
        "warm_up_rounds": samples.warm_up,
        **known,
        **samples.watched,
        "order": samples.orders,
        "ttft_ms": {name: {str(n): _ms(t.ttft[n]) for n in lengths} for name, t in times.items()},
        "itl_ms": {name: [_ms(run) for run in t.itl] for name, t in times.items()},
        "joules_per_token": {name: {str(n): rounded(v) for n, v in of.items()} for name, of in samples.joules.items()},
        "tpot_ms": {name: _ms([float(np.mean(run)) for run in t.itl]) for name, t in times.items()},
    }
    return Latency(figures, details, notes)


def _figures(times: dict[str, _Times], ideals: _Ideals) -> tuple[Figure, ...]:
    own, dense = times["shrunk"], times.get("baseline")
    decode = ideals.decode
    figures = [
        paired_figure(
            f"prefill.ttft_ms.{length}",
            "ms",
            [1e3 * value for value in seconds],
            [1e3 * value for value in dense.ttft[length]] if dense else None,
            ideal=ideals.prefill.get(length),
            floor=ideals.prefill_floor.get(length),
        )
        for length, seconds in own.ttft.items()
    ]
    if not own.itl:
        return tuple(figures)

    def per_run(of: Callable[[list[float]], float]) -> tuple[list[float], list[float] | None]:
        return [of(run) for run in own.itl], [of(run) for run in dense.itl] if dense else None

    tpot = per_run(lambda run: 1e3 * float(np.mean(run)))
    rate = per_run(lambda run: 1 / float(np.mean(run)))
    floor = ideals.decode_floor
    figures.append(paired_figure("decode.tpot_ms", "ms", *tpot, ideal=decode, floor=floor))
    for q in PERCENTILES:
        runs = per_run(lambda run, q=q: 1e3 * float(np.percentile(run, q)))  # type: ignore[misc]
        pooled = (_pooled(own, q), _pooled(dense, q) if dense else None)
        figures.append(paired_figure(f"decode.itl_ms.p{q}", "ms", *runs, ideal=decode, floor=floor, pooled=pooled))
    figures.append(
        paired_figure("decode.tokens_per_s", "tokens/s", *rate, ideal=1 / decode if decode else None, better="higher")
    )
    return tuple(figures)


def _energy_figures(samples: interleaved.Samples, pasts: Sequence[int]) -> tuple[Figure, ...]:
    """None where the machine does not tell."""
    name = "decode.joules_per_token"
    each = {model: [value for past in pasts for value in of[past]] for model, of in samples.joules.items()}
    if not each["shrunk"]:
        return ()
    made = paired_figure(name, "J", each["shrunk"], each.get("baseline"))
    return (replace(made, note=f"{made.note}; whole processor package, with the prefill of the prompt"),)


def _floors(decoder: Decoder, estimates: Estimates, lengths: Sequence[int], context: float) -> _Ideals:
    most = rates.measured(decoder.threads)
    precision = decoder.precision
    return _Ideals(
        {},
        None,
        {}  # 8-bit products are faster than the float ones that were measured
        if is_quantised(precision)
        else {n: 1e3 * _prefill_flops(decoder, estimates, n) / most.flops_per_second for n in lengths},
        1e3 * decode_bytes(estimates, context, precision, bits=decoder.bits) / most.read_bytes_per_second,
    )


def _prefill_flops(decoder: Decoder, estimates: Estimates, length: int) -> int:
    return estimates.prefill_flops(length, all_logits=not decoder.last_only)


def decode_bytes(
    estimates: Estimates, context: float, precision: str, *, half: bool = False, bits: Bits | None = None
) -> float:
    """Bytes that a graph of this precision reads for one token: the streamed weights once, scales and zero points with
    them, and the cache of `context` tokens. What an int precision leaves is in 32 bits, or 16 if `half`. `bits` are
    those of something that is no graph of ours."""
    each = estimates.bytes / estimates.parameters  # the estimates are in the checkpoint's dtype
    weights = estimates.decode_bytes_per_token / each
    head = min(estimates.head_flops / 2, weights)
    cached = estimates.kv_cache_bytes_per_token / each * context
    if bits is not None:
        return ((weights - head) * bits[0] + head * bits[1] + cached * bits[2]) / 8
    own_bits, head_bits = BITS[precision]
    if not is_quantised(precision):
        return ((weights - head) * own_bits + head * head_bits + cached * own_bits) / 8
    plain = 16 if half else 32

    def each_with_its_block(bits: float) -> float:  # 32 weights share a scale and a zero point
        return bits + (plain + bits) / 32

    parts = (weights - head) * each_with_its_block(own_bits), head * each_with_its_block(head_bits), cached * plain
    return sum(parts) / 8


def _pooled(times: _Times, q: int) -> float:
    return 1e3 * float(np.percentile(np.concatenate(times.itl), q))


def _stretch(text: NDArray[np.int64], length: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`length` tokens from a random place of the text, which is repeated where it is too short."""
    start = int(rng.integers(0, max(1, len(text) - length + 1)))
    return np.resize(text[start:], length)


def _ms(seconds: Sequence[float]) -> list[float]:
    """For the record."""
    return rounded([1e3 * value for value in seconds])
