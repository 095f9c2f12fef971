"""The matrix of a linear layer as [out, in], however it is stored."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def matrix(module: nn.Module) -> torch.Tensor:
    """[out, in]: the weight of a Linear, or a view of that of a Conv1D, which is stored as [in, out]."""
    weight = module.get_parameter("weight").data
    return weight.T if isinstance(module, Conv1D) else weight


def set_matrix(module: nn.Module, W: torch.Tensor) -> None:
    """Puts W [out, in] in place of the weight; precision and device are those of W."""
    module.get_parameter("weight").data = W.T.contiguous() if isinstance(module, Conv1D) else W
