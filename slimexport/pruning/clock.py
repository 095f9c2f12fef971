"""Where the time of pruning goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Stopwatch:
    """Seconds by what they were spent on; waits for the device, so that CUDA time lands where it belongs."""

    device: torch.device
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("forward", "hessian", "selection", "fit"), 0.0)
    )

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[what] += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
