"""How often does noise decide a gate? A graph against itself, and against itself made 5 % slower.

    python benchmarks/gate_noise.py DIR --record 4     # DIR: an exported directory; 4 recordings of 80 rounds
    python benchmarks/gate_noise.py DIR --real 20      # decisions as a run makes them, each with sessions of its own
    python benchmarks/gate_noise.py --simulate 10000   # decisions by block bootstrap from the recordings
    python benchmarks/gate_noise.py --render

The gate is `ratio(decode.tpot_ms)<=1.02`, with the default number of runs and the default budget. The slower one is
the same graph whose every step is followed by 5 % of its time in a loop that does nothing.

A simulated decision takes rounds from one recording in blocks of BLOCK that stood beside each other, so that slow
phases of the machine stay in one piece; the 5 % are multiplied onto one side. Close other work on the machine before
you record.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, load_rows, save_rows, table

from slimexport.artifacts import VerificationReport
from slimexport.config import RunConfig
from slimexport.gates.decide import evaluate, parse
from slimexport.stages.inputs import looks
from slimexport.verification.intervals import paired_figure

GATE = parse("ratio(decode.tpot_ms)<=1.02")
SLOWER = 1.05
BLOCK = 5  # rounds
PAST, TOKENS = 128, 32
DEFAULTS = RunConfig(model="-")
RUNS, BUDGET = DEFAULTS.latency_runs, DEFAULTS.max_latency_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--record", type=int, default=0, metavar="N")
    parser.add_argument("--real", type=int, default=0, metavar="N")
    parser.add_argument("--simulate", type=int, default=0, metavar="N")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=RESULTS / "gate_noise.json")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    rows = load_rows(options.out)
    for _ in range(options.record):
        kept = record(options.directory, options.threads)
        if kept:
            rows.append(kept)
            save_rows(options.out, rows)
    for number in range(options.real):
        for slower in (1.0, SLOWER):
            made = real(options.directory, options.threads, slower)
            print(f"{number}: {slower:g}: {made}", flush=True)
            rows.append({"kind": "real", "slower": slower, **made})
            save_rows(options.out, rows)
    if options.simulate:
        traces = [row["ratios"] for row in rows if row["kind"] == "recording"]
        rows = [row for row in rows if row["kind"] != "simulated"]
        for slower in (1.0, SLOWER):
            counts = simulated(traces, slower, options.simulate, np.random.default_rng(0))
            rows.append({"kind": "simulated", "slower": slower, "decisions": options.simulate, **counts})
        save_rows(options.out, rows)
    print(render(rows))


# ---------------------------------------------------------------------------------------------------------- decisions


def outcome(shrunk: np.ndarray, baseline: np.ndarray) -> str:
    """Of the gate on these rounds, seconds of a token of both."""
    report = VerificationReport(
        (paired_figure("decode.tpot_ms", "ms", shrunk.tolist(), baseline.tolist()),),
        latency={"tpot_ms": {"shrunk": shrunk.tolist(), "baseline": baseline.tolist()}},
    )
    (result,) = evaluate((GATE,), report, looks=looks(RUNS, BUDGET))
    return result.outcome


def simulated(traces: list[list[float]], slower: float, decisions: int, rng: np.random.Generator) -> dict[str, int]:
    """How many decisions of each outcome; a run goes on until the gate is decided or its budget is used up."""
    found: Counter[str] = Counter()
    for _ in range(decisions):
        trace = np.asarray(traces[rng.integers(len(traces))])
        starts = rng.integers(0, len(trace) - BLOCK + 1, -(-BUDGET // BLOCK))
        rounds = np.concatenate([trace[start : start + BLOCK] for start in starts])[:BUDGET] * slower
        count, made = RUNS, outcome(rounds[:RUNS], np.ones(RUNS))
        while made == "undecided" and count < BUDGET:
            count = min(2 * count, BUDGET)
            made = outcome(rounds[:count], np.ones(count))
        found[made] += 1
    return {name: found[name] for name in ("passed", "failed", "undecided")}


# ------------------------------------------------------------------------------------------------------- measurements


def record(directory: Path, threads: int | None) -> dict[str, Any] | None:
    """Ratios of one graph opened twice, round by round; None where the machine had other work."""
    samples = measured(directory, threads, 1.0, BUDGET, None)
    if samples.busy:
        print(f"{samples.busy}; not kept", flush=True)
        return None
    own, other = (tpot(samples, name) for name in ("shrunk", "baseline"))
    return {"kind": "recording", "ratios": (own / other).round(6).tolist(), **samples.watched}


def real(directory: Path, threads: int | None, slower: float) -> dict[str, Any]:
    """One decision as `slimexport run` makes it."""

    def decided(samples: Any) -> bool:
        return not samples.busy and outcome(tpot(samples, "shrunk"), tpot(samples, "baseline")) != "undecided"

    started = time.monotonic()
    samples = measured(directory, threads, slower, RUNS, decided)
    own, other = tpot(samples, "shrunk"), tpot(samples, "baseline")
    return {
        "outcome": "undecided" if samples.busy else outcome(own, other),
        "rounds": len(own),
        "ratio": float(np.median(own / other)),
        "seconds": round(time.monotonic() - started, 1),
    }


def measured(directory: Path, threads: int | None, slower: float, rounds: int, enough: Any) -> Any:
    from slimexport.machine import huge_pages
    from slimexport.machine.cores import default_threads
    from slimexport.runtime import OnnxDecoder
    from slimexport.verification import interleaved

    class Slower(OnnxDecoder):
        def last_logits(self, *args: Any, **more: Any) -> Any:
            started = time.perf_counter()
            made = super().last_logits(*args, **more)
            until = time.perf_counter() + (slower - 1) * (time.perf_counter() - started)
            while time.perf_counter() < until:
                pass
            return made

    threads = threads or default_threads()
    kind = OnnxDecoder if slower == 1 else Slower
    models = {"shrunk": kind(directory, threads=threads), "baseline": OnnxDecoder(directory, threads=threads)}
    huge_pages.ask()
    rng = np.random.default_rng()
    vocabulary = int(models["baseline"].vocab_size or 1000)
    quantities = interleaved.Quantities((), (PAST,), TOKENS)
    return interleaved.measure(
        models, quantities, lambda n: rng.integers(0, vocabulary, n), rounds=rounds, threads=threads,
        enough=enough, at_most=BUDGET,
    )  # fmt: skip


def tpot(samples: Any, name: str) -> np.ndarray:
    return np.array([np.mean(run) for run in samples.itl[name][PAST]])


def render(rows: list[dict[str, Any]]) -> str:
    body = []
    for kind in ("simulated", "real"):
        for slower in (1.0, SLOWER):
            of = [row for row in rows if row["kind"] == kind and row["slower"] == slower]
            if not of:
                continue
            if kind == "simulated":
                counts, rounds = of[-1], "–"
            else:
                counts = Counter(row["outcome"] for row in of)
                rounds = f"{np.mean([row['rounds'] for row in of]):.0f}"
            total = sum(counts.get(name, 0) for name in ("passed", "failed", "undecided"))
            cells = [str(counts.get(name, 0)) for name in ("passed", "failed", "undecided")]
            what = "against itself" if slower == 1 else f"{slower - 1:.0%} slower"
            body.append([f"{kind}, {what}", str(total), *cells, rounds])
    return table(["decisions", "number", "passed", "failed", "undecided", "rounds"], body)


if __name__ == "__main__":
    main()
