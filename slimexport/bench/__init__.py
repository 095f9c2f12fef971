"""`slimexport bench`: models of any kind, measured side by side in one run, each the same way.

subjects/    how each kind of model is opened and asked (one file a kind)
settings.py  what is measured
results.py   figures, their intervals, the table and the JSON

The measuring itself is that of the latency report: `verification/interleaved.py`, `machine/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slimexport.bench.settings import Settings

if TYPE_CHECKING:
    from slimexport.bench.results import BenchResult
    from slimexport.progress import Progress

__all__ = ["Settings", "bench"]


def bench(
    paths: Sequence[str | Path], settings: Settings | None = None, progress: Progress | None = None
) -> BenchResult:
    """Measures what is in `paths`: exported directories or their model.onnx, run directories (every export, and the
    baselines), Hugging Face directories, GGUF files. The first model is what the others are compared with.

    Raises BadInputError for a path that is none of these and for prompts that do not fit a model's positions.
    """
    import numpy as np

    from slimexport.bench.results import result
    from slimexport.bench.subjects import open_all
    from slimexport.errors import BadInputError
    from slimexport.machine import huge_pages, rates
    from slimexport.verification import interleaved

    settings = settings or Settings()
    subjects = open_all([Path(path) for path in paths], settings)
    for name, subject in subjects.items():
        if subject.max_positions is not None and settings.longest > subject.max_positions:
            raise BadInputError(
                f"{name}: {settings.longest} tokens are more than its {subject.max_positions} positions."
            )
    if settings.huge_pages:
        huge_pages.ask()
    if progress:
        progress.note("what this machine can do")
    most = rates.measured(settings.resolved_threads)
    rng, vocabulary = np.random.default_rng(settings.seed), min(s.vocabulary for s in subjects.values())
    samples = interleaved.measure(
        subjects,
        settings.quantities,
        lambda length: rng.integers(0, vocabulary, length),
        rounds=settings.rounds,
        threads=settings.resolved_threads,
        progress=(lambda done, total: progress.update(done, total, "rounds")) if progress else None,
        on_cpu=settings.provider == "cpu",
    )
    return result(subjects, settings, most, samples)
