"""How many cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path

from slimexport.errors import BadInputError


def default_threads() -> int:
    """Cores this process may use, by its affinity and by the CPU quota of its container; ONNX Runtime's own default is
    every core of the machine."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    return max(1, min(cores, int(_quota() or cores)))


def checked_threads(threads: int | None) -> int:
    """`threads`, or as many as this process may use. Raises BadInputError for more, which would only get into each
    other's way."""
    most = default_threads()
    if threads is not None and not 1 <= threads <= most:
        raise BadInputError(f"threads must be from 1 to {most}, the cores that this process may use, not {threads}.")
    return threads or most


def _quota() -> float | None:
    """Cores' worth of time that the container may use; None for as much as there is."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no such file, or "max"
        return None
