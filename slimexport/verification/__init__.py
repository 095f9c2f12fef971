"""Everything measured on the exported graphs: shrunk beside baseline, in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from slimexport.artifacts import Estimates, ExportArtifact, Figure, TextSource, VerificationReport

if TYPE_CHECKING:
    import torch

    from slimexport.config import RunConfig
    from slimexport.runtime import Decoder
    from slimexport.verification.perplexity import Accuracy

Progress = Callable[[float, float, str], None]
"""Called with done, total and what is counted; a smaller `done` starts the next loop (`progress.Progress.update`)."""


class EvaluationText(Protocol):
    """What `verify` needs of an evaluation text: token ids int64 [n], and where they came from."""

    @property
    def input_ids(self) -> torch.Tensor: ...

    @property
    def source(self) -> TextSource: ...


def verify(
    shrunk: ExportArtifact,
    baseline: ExportArtifact | None,
    eval_text: EvaluationText,
    config: RunConfig,
    shrunk_estimates: Estimates | None,
    baseline_estimates: Estimates | None,
    shrunk_numerics: dict[str, Any],
    baseline_numerics: dict[str, Any] | None,
    progress: Progress | None = None,
    dense: ExportArtifact | None = None,
    enough: Callable[[VerificationReport], bool] | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> VerificationReport:
    """Measures both graphs: footprint, accuracy on `eval_text`, latency. No torch model is needed.

    Accuracy is held to `dense`, or the baseline: of a quantised graph to the dense model in full precision. Latency is
    measured on, up to `config.max_latency_runs`, until the report is `enough`. With `decode`, which makes text of token
    ids, the report shows how both models go on after `config.continuations` places of the text.

    The numerics were found at the export, where the torch models were in memory (`numerics.check_export`); they become
    figures here. Without a baseline all ratios and the KL divergence are missing. Raises BadInputError if a graph
    cannot be opened with `config.provider`, or a window does not fit the model.
    """
    import numpy as np

    from slimexport.errors import BadInputError
    from slimexport.machine.cores import checked_threads
    from slimexport.runtime import open_decoder
    from slimexport.verification.continuations import continuations
    from slimexport.verification.footprint import process_figures, size_figure
    from slimexport.verification.latency import Latency, measure_latency
    from slimexport.verification.perplexity import accuracy

    ids = np.asarray(eval_text.input_ids, np.int64)
    places = Path(shrunk.path), Path(baseline.path) if baseline else None
    threads = checked_threads(config.threads)

    def telling(text: str) -> Callable[[int, int], None] | None:
        return None if progress is None else (lambda done, total: progress(done, total, text))

    processes: tuple[Figure, ...] = ()
    footprint: dict[str, Any] = {}
    if config.latency_runs:  # before this process fills the memory with both graphs
        processes, footprint = process_figures(
            *places, config.provider, threads, telling("loads"), config.provider_option
        )

    def opened(place: Path | str) -> Decoder:
        return open_decoder(Path(place), config.provider, threads, config.provider_options)

    own = opened(places[0])
    other = opened(places[1]) if places[1] else None
    if own.max_positions is not None and config.eval_window > own.max_positions:
        raise BadInputError(
            f"eval_window {config.eval_window} is longer than the model's {own.max_positions} positions."
        )
    same = dense is None or (baseline is not None and dense.path == baseline.path)
    reference = other if same or dense is None else opened(dense.path)
    scored = accuracy(own, reference, ids, config.eval_window, telling("tokens of evaluation text"))
    said = continuations(own, reference, ids, config.continuations, decode) if decode else ()
    del reference

    def report(latency: Latency) -> VerificationReport:
        figures = (
            *scored.figures(),
            *latency.figures,
            size_figure(*places),
            *processes,
            _kv_figure(own, other),
            *_placement_figures(own, other),
            *_numerics_figures(shrunk_numerics, baseline_numerics),
        )
        return VerificationReport(
            figures=figures,
            numerics={"shrunk": shrunk_numerics, "baseline": baseline_numerics},
            accuracy={"text": eval_text.source.name, "text_sha256": eval_text.source.sha256, **scored.to_dict()},
            latency={**latency.details, "processes": footprint} if config.latency_runs else {},
            notes=latency.notes,
            continuations=said,
        )

    latency = measure_latency(
        own,
        other,
        ids,
        prompt_lengths=config.prompt_lengths,
        decode_tokens=config.decode_tokens,
        runs=config.latency_runs,
        seed=config.seed,
        shrunk_estimates=shrunk_estimates,
        baseline_estimates=baseline_estimates,
        progress=telling("latency rounds"),
        enough=(lambda found: enough(report(found))) if enough else None,
        at_most=config.max_latency_runs,
    )
    return report(latency)


LIGHT = (
    "light verification: of the graph three calls on one prompt were held against torch; perplexity and KL are of the "
    "checkpoint in torch, block by block. Not checked: greedy tokens, padding, latency, memory, how the graph goes on."
)


def verify_light(
    shrunk: ExportArtifact, eval_text: EvaluationText, scored: Accuracy, numerics: dict[str, Any]
) -> VerificationReport:
    """What can be said of an export that is not opened here: `scored` is the checkpoint's (`streamed_accuracy`), the
    numerics were found at the export."""
    from slimexport.verification.footprint import size_figure

    figures = (*scored.figures(), size_figure(Path(shrunk.path), None), *_numerics_figures(numerics, None))
    return VerificationReport(
        figures=figures,
        numerics={"shrunk": numerics, "baseline": None},
        accuracy={"text": eval_text.source.name, "text_sha256": eval_text.source.sha256, **scored.to_dict()},
        latency={},
        notes=(LIGHT,),
        continuations=(),
    )


def _placement_figures(own: Decoder, other: Decoder | None) -> tuple[Figure, ...]:
    """What another provider than the CPU leaves to the CPU."""
    if own.provider == "cpu":
        return ()
    left = own.placement.get("CPUExecutionProvider", {})
    dense = other.placement.get("CPUExecutionProvider", {}) if other else None
    named = ", ".join(f"{count} {operator}" for operator, count in left.items()) or "none"
    return (
        Figure(
            "placement.cpu_nodes",
            "nodes",
            shrunk=sum(left.values()),
            baseline=None if dense is None else sum(dense.values()),
            note=f"operators that {own.provider} leaves to the CPU: {named}",
        ),
    )


def _kv_figure(own: Decoder, dense: Decoder | None) -> Figure:
    mine, other = own.kv_bytes_per_token, dense.kv_bytes_per_token if dense else None
    return Figure(
        "memory.kv_bytes_per_token",
        "bytes",
        shrunk=mine,
        baseline=other,
        ratio=mine / other if other else None,
        note="keys and values of all blocks, as the export holds them",
    )


def _numerics_figures(own: dict[str, Any], dense: dict[str, Any] | None) -> tuple[Figure, ...]:
    def pair(data: dict[str, Any] | None, key: str) -> float | None:
        return None if data is None else data.get(key)

    def agreement(data: dict[str, Any] | None) -> float | None:
        return data["greedy_equal"] / data["greedy_tokens"] if data and data.get("greedy_tokens") else None

    ties = len(own.get("ties", ()))
    what = "graph against the numbers that its weights stand for" if own.get("before") else "graph against torch"
    return (
        *(
            Figure(
                f"numerics.{key}",
                "logits",
                shrunk=pair(own, key),
                baseline=pair(dense, key),
                note=what,
            )
            for key in ("max_logit_difference", "mean_logit_difference")
        ),
        Figure(
            "numerics.greedy_agreement",
            "share",
            shrunk=agreement(own),
            baseline=agreement(dense),
            better="higher",
            note=f"greedy tokens, {what}; {ties} ties within the tolerance",
        ),
    )
