"""The matrix of a linear layer as [out, in], however it is stored; of experts [experts, out, in]."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def matrix(module: nn.Module) -> torch.Tensor:
    """The weight of a Linear, a view of that of a Conv1D, which is stored as [in, out], or the experts' down_proj."""
    weight = _parameter(module).data
    return weight.T if isinstance(module, Conv1D) else weight


def set_matrix(module: nn.Module, W: torch.Tensor) -> None:
    """Puts W in place of what `matrix` gives; precision and device are those of W."""
    _parameter(module).data = W.T.contiguous() if isinstance(module, Conv1D) else W


def _parameter(module: nn.Module) -> nn.Parameter:
    parameters = dict(module.named_parameters(recurse=False))
    return parameters["weight"] if "weight" in parameters else parameters["down_proj"]
