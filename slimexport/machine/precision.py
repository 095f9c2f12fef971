"""Which precisions this machine computes fast in."""

from __future__ import annotations

import torch


def fast_bfloat16(device: torch.device) -> torch.dtype | None:
    """bfloat16 where products in it are faster than in float32; None where not."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    # torch offers no public name for it
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return torch.bfloat16 if known is not None and known() else None
