"""How long `slimexport --help` takes, interpreter start included: the best of ten, since the machine may be busy.

    python benchmarks/startup.py

Exit code 1 where it is not under half a second.
"""

from __future__ import annotations

import subprocess
import sys
import time

BAR = 0.5  # seconds


def main() -> int:
    times = []
    for _ in range(10):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "slimexport.cli", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    print(f"slimexport --help: best {min(times):.2f} s of ten, bar {BAR} s")
    return int(min(times) >= BAR)


if __name__ == "__main__":
    sys.exit(main())
