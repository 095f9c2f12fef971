"""The figures that a report can have, and their units: what a gate may name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from slimexport.errors import nearest
from slimexport.gates.declared import RELATIVE, Gate

TTFT = "prefill.ttft_ms."
TASK = "task."
_FIGURES = {
    "accuracy.perplexity": "perplexity",
    "accuracy.nll": "nats/token",
    "accuracy.kl": "nats/token",
    "accuracy.top1_agreement": "share",
    "decode.tpot_ms": "ms",
    "decode.itl_ms.p50": "ms",
    "decode.itl_ms.p90": "ms",
    "decode.itl_ms.p99": "ms",
    "decode.tokens_per_s": "tokens/s",
    "decode.joules_per_token": "J",
    "size.export_mb": "MB",
    "load.seconds": "s",
    "memory.peak_rss_mb": "MB",
    "memory.device_mb": "MB",
    "memory.kv_bytes_per_token": "bytes",
    "placement.cpu_nodes": "nodes",
    "numerics.max_logit_difference": "logits",
    "numerics.mean_logit_difference": "logits",
    "numerics.greedy_agreement": "share",
}


def known(prompt_lengths: Sequence[int]) -> Mapping[str, str]:
    """Name -> unit of every figure that a run with these prompts can report, but for those of tasks."""
    return {**{f"{TTFT}{length}": "ms" for length in prompt_lengths}, **_FIGURES}


def check(gates: Iterable[Gate], prompt_lengths: Sequence[int], tasks: Sequence[str] = ()) -> None:
    """Raises ValueError, one line, for the first gate on a figure that there is not, or in another unit. Which metrics
    a task has, lm-eval says only when it is asked."""
    units = dict(known(prompt_lengths))
    for gate in gates:
        if gate.figure.startswith(TASK):
            name = gate.figure.removeprefix(TASK).rpartition(".")[0]
            if name not in tasks:
                raise ValueError(f"no figure {gate.figure!r}: tasks are {', '.join(tasks) or 'none'} (--tasks)")
            units[gate.figure] = "share" if gate.figure.endswith(".torch_agreement") else "score"
        if gate.figure not in units:
            raise ValueError(_unknown(gate.figure, units))
        unit = "share" if gate.of in RELATIVE or units[gate.figure] == "score" else units[gate.figure]
        if gate.unit and gate.unit.lower() != unit.lower() and not (gate.unit == "%" and unit == "share"):
            wanted = "a plain number or %" if unit == "share" else unit
            raise ValueError(f"{str(gate)!r}: {gate.figure} is in {wanted}, not in {gate.unit}")


def _unknown(figure: str, units: Mapping[str, str]) -> str:
    if figure.startswith(TTFT):
        lengths = ", ".join(name.removeprefix(TTFT) for name in units if name.startswith(TTFT))
        return f"no figure {figure!r}: prompts of {lengths or 'no length'} are measured (prompt_lengths)"
    return f"no figure {figure!r}.{nearest(figure, units)}".rstrip(".")
