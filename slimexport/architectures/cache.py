"""What transformers calls a KV cache: `cache` from 5.24 on, `past_key_values` before (and in code from elsewhere)."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

NEW, OLD = "cache", "past_key_values"


def cache_argument(model: nn.Module) -> str:
    """The name under which the model's forward takes one (of a model in peft's wrapper: the model's)."""
    model = getattr(model, "get_base_model", lambda: model)()
    return NEW if NEW in inspect.signature(model.forward).parameters else OLD


def cache_of(output: Any) -> Any:
    """The cache that a forward pass gave, or None."""
    found = getattr(output, NEW, None)
    return found if found is not None else getattr(output, OLD, None)
