"""How much memory is free."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> tuple[int, int]:
    """Of the host, by its own account and by the limit of this container, with what this process has already; and of
    `device`, where that is a CUDA one."""
    import psutil
    import torch

    own = psutil.Process().memory_info().rss
    host = psutil.virtual_memory().available + own
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        host = min(host, int((_GROUP / "memory.max").read_text()))
    on_device = 0
    if device.type == "cuda":
        on_device = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return host, on_device
