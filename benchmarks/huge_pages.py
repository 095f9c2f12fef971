"""Is the session that is opened first slower? The same graph several times in one process, with and without huge pages.

    python benchmarks/huge_pages.py DIR [--sessions 3] [--rounds 10]     # DIR: an exported directory

One process for each kind of memory; medians over rounds of the median time between tokens, 32 tokens after 128.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

TUNABLE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
KINDS: dict[str, dict[str, str]] = {"as it comes": {}, "malloc": TUNABLE, "asked": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--sessions", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--kind", choices=KINDS, help="this one, in this process")
    options = parser.parse_args()
    if options.kind:
        measure(options)
        return
    for kind, environment in KINDS.items():
        subprocess.run([sys.executable, *sys.argv, "--kind", kind], env={**os.environ, **environment}, check=True)


def measure(options: argparse.Namespace) -> None:
    import numpy as np

    from slimexport.machine import huge_pages
    from slimexport.runtime import OnnxDecoder

    sessions = [OnnxDecoder(options.directory, threads=1) for _ in range(options.sessions)]
    held = huge_pages.ask() if options.kind == "asked" else huge_pages.held()
    times: list[list[float]] = [[] for _ in sessions]
    for number in range(options.rounds + 2):  # the first two are the warm-up
        order = list(range(len(sessions)))[:: 1 if number % 2 == 0 else -1]
        for place in order:
            times[place].append(1e3 * float(np.median(sessions[place].timed_greedy(np.arange(128), 32).token_seconds)))
    medians = ", ".join(f"{np.median(seconds[2:]):.1f}" for seconds in times)
    print(f"{options.kind}: {medians} ms a token; {held / 1e6:.0f} MB in huge pages", flush=True)


if __name__ == "__main__":
    main()
