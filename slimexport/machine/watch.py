"""Whether the machine had anything else to do while it was measured."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from slimexport.machine.cores import default_threads

# Threads that work alone on their cores are on the CPU nearly all the time, also while they wait for each other. Below
# this share, while others work, the cores were not ours, and ratios are pressed toward 1 although they look steady.
MIN_CPU_SHARE = 0.75
MAX_OTHERS = 0.1  # cores that others keep busy meanwhile; less has not taken that much from us
MAX_LOAD = 0.25  # of all cores, kept busy by others, where all are ours to use: memory is shared even by idle cores
MAX_STEAL = 0.05  # of all time: what the host of this virtual machine gave to others
MAX_THROTTLED = 0.02  # of all time: what a container's CPU quota held us up


class Watch:
    """Watches the machine while something is measured: `with Watch(threads) as watch: ...`, then `watch.busy`."""

    def __init__(self, threads: int):
        self.threads = threads
        self.found: dict[str, float] = {}

    def __enter__(self) -> Watch:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._machine, self._throttled = _machine_seconds(), _throttled_seconds()
        return self

    def __exit__(self, *_: Any) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.found = {"cpu_share": round(cpu / wall / self.threads, 3)}
        (worked, stolen), (before_worked, before_stolen) = _machine_seconds(), self._machine
        self.found["others"] = round(max(0.0, worked - before_worked - cpu) / wall, 3)
        self.found["steal"] = round((stolen - before_stolen) / wall / (os.cpu_count() or 1), 4)
        if (throttled := _throttled_seconds()) is not None and self._throttled is not None:
            self.found["throttled"] = round((throttled - self._throttled) / wall, 4)
        if (load := _load()) is not None:
            self.found["load_average"] = load

    @property
    def busy(self) -> str | None:
        """Why nothing that was measured meanwhile counts; None where the machine was ours."""
        share, steal = self.found.get("cpu_share", 1.0), self.found.get("steal", 0.0)
        others, throttled = self.found.get("others", 0.0), self.found.get("throttled", 0.0)
        cores = os.cpu_count() or 1
        if share < MIN_CPU_SHARE and others > MAX_OTHERS:
            return (
                f"the machine was busy: the runs had {share:.0%} of their {self.threads} cores, "
                f"other work kept {others:.1f} busy"
            )
        if default_threads() == cores and others > MAX_LOAD * cores:
            return f"the machine was busy: other work kept {others:.1f} of its {cores} cores busy"
        if steal > MAX_STEAL:
            return f"the machine was busy: its host gave {steal:.0%} of its time to others"
        if throttled > MAX_THROTTLED:
            return f"a CPU quota held the runs up for {throttled:.0%} of the time: ask for fewer threads (--threads)"
        return None


def _machine_seconds() -> tuple[float, float]:
    """Seconds that all cores have worked since the start, and that the host kept for others."""
    import psutil

    times = psutil.cpu_times()
    worked = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
    return worked, float(getattr(times, "steal", 0.0))


def _throttled_seconds() -> float | None:
    """Seconds for which the CPU quota of this container stopped it; None where there is none."""
    for path, name, unit in (
        ("/sys/fs/cgroup/cpu.stat", "throttled_usec", 1e-6),
        ("/sys/fs/cgroup/cpu/cpu.stat", "throttled_time", 1e-9),
    ):
        try:
            lines = dict(line.split(" ", 1) for line in Path(path).read_text().splitlines())
            return int(lines[name]) * unit
        except (OSError, KeyError, ValueError):
            continue
    return None


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
