"""How much memory is free."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_GROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes that can still be had, by the system's account and, with cgroup v2, by the limit of this container."""
    import psutil

    host: int = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        limit, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        # Pages of files that were read count as used, and are taken back as soon as memory is asked for.
        counted = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        used -= int(counted.get("inactive_file", 0)) + int(counted.get("active_file", 0))
        host = min(host, max(limit - used, 0))
    return host


def resident() -> int:
    """Bytes of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def free_bytes(device: torch.device) -> tuple[int, int]:
    """Of the host, with what this process has already; and of `device`, where that is a CUDA one."""
    import torch

    host = available() + resident()
    on_device = 0
    if device.type == "cuda":
        on_device = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return host, on_device
