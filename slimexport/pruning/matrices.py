"""The matrix of a linear layer as [out, in], however it is stored; of experts [experts, out, in]."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def matrix(module: nn.Module) -> torch.Tensor:
    """The weight of a Linear, or the experts' down_proj; a view of it where it is stored as [in, out]."""
    weight = _parameter(module).data
    return weight.mT if is_transposed(module) else weight


def set_matrix(module: nn.Module, W: torch.Tensor) -> None:
    """Puts W in place of what `matrix` gives; precision and device are those of W."""
    _parameter(module).data = W.mT.contiguous() if is_transposed(module) else W


def is_transposed(module: nn.Module) -> bool:
    """Whether it is stored as [in, out]."""
    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))


def _parameter(module: nn.Module) -> nn.Parameter:
    parameters = dict(module.named_parameters(recurse=False))
    return parameters["weight"] if "weight" in parameters else parameters["down_proj"]
