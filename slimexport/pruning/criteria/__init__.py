"""Criteria: what scores heads and channels and (maybe) compensates. One file each, found by the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from slimexport.artifacts import BlockSizes
from slimexport.pruning.curvature import Weighting
from slimexport.pruning.obs import Selection
from slimexport.registry import Registry


@dataclass(frozen=True)
class Site:
    """One output matrix of one block (o_proj, down_proj), what is known of its inputs, and what is to stay of it.

    All tensors are float64 on one device. `sources` are the weights whose rows make the inputs of W (q, k, v; gate,
    up), by name, shaped [rows, hidden]; `gradients` are those of the NLL on calibration text by all these weights and
    by W, by name; both are empty unless the criterion says `needs_gradients`.
    """

    W: torch.Tensor  # [out, in]
    H: torch.Tensor  # [in, in], the undamped mean of the inputs' outer products
    mean: torch.Tensor  # [in], of the inputs
    dense: BlockSizes
    keep: BlockSizes
    head_dim: int
    group_size_start: int
    group_size_end: int
    damping: float
    name: str = ""  # of W
    block: int = 0
    seed: int = 0
    sources: Mapping[str, torch.Tensor] = field(default_factory=dict)
    gradients: Mapping[str, torch.Tensor] = field(default_factory=dict)
    weighting: Weighting | None = None  # of errors by what they do to the model's output; None: all count alike


class Criterion(Protocol):
    """Chooses and compensates. `Selection.kept` are query heads for `heads`, channels for `channels`.

    A criterion with `needs_gradients = True` finds them in the site; where it has a `gradient_rank` as well, they are
    those of adapters (pruning/gradients.py). One with `compensates_bias = True` returns a `Selection.bias`; one with
    `weighs_errors = True` finds a `weighting` (or None) there: it chooses by the errors of `weighted(W,
    site.weighting)`, and returns W `unweighted`.
    """

    def heads(self, site: Site) -> tuple[Selection, float]:
        """The selection and the damping that was used (0.0 where none is)."""
        ...

    def channels(self, site: Site) -> tuple[Selection, float]: ...


registry: Registry[Criterion] = Registry(
    "criterion", package="slimexport.pruning.criteria", group="slimexport.criteria"
)
