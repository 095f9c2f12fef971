"""Which weights transformers keeps in float32, whatever the precision of the rest (routers, mostly)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def stays_in_float32(model: PreTrainedModel, name: str, dtype: torch.dtype) -> bool:
    """Whether transformers keeps parameter `name` in float32 in a model of precision `dtype` (routers, mostly)."""
    return has_part(name, parts_in_float32(model, dtype))


def parts_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> frozenset[str]:
    """Parts of the names of those parameters."""
    import torch

    kept = set(model._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else set()
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    return frozenset(kept)


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """In place, as transformers would load it in `dtype`: parameters that it keeps in float32 stay so, and buffers as
    they are. (`model.to(dtype)` rounds those too, rotary frequencies among them.) So does what is not read yet."""
    import torch

    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(torch.float32 if stays_in_float32(model, name, dtype) else dtype)


def kept_in_float32(config: PreTrainedConfig) -> frozenset[str]:
    """Parts of the names of what transformers keeps in float32, whatever the precision of the rest."""
    from transformers import AutoModelForCausalLM

    known = AutoModelForCausalLM._model_mapping
    kind = known.get(type(config), None)
    return frozenset(getattr(kind, "_keep_in_fp32_modules_strict", None) or ())


def has_part(name: str, parts: Iterable[str]) -> bool:
    return any(f".{part}." in f".{name}." for part in parts)
