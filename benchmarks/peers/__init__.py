"""Other pruners, put to the same task as ours: the same share of the block linear parameters, the residual left alone.

Each module has one function that takes a model and gives a smaller copy; it says what its library can do here, what it
cannot, and on what its settings were chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TOLERANCE = 0.005  # of all block linear parameters
ATTENTION, FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def block_parameters(model: Any) -> int:
    """Weights of the block linear layers: q, k, v, o, gate, up, down; biases are not counted."""
    return sum(linear.weight.numel() for linear in block_linears(model))


def block_linears(model: Any) -> Iterator[Any]:
    for block in model.model.layers:
        yield from (getattr(block.self_attn, name) for name in ATTENTION)
        yield from (getattr(block.mlp, name) for name in FFN)


def pruned(peer: str, model: Any, calibration_ids: Any, ratio: float, **settings: Any) -> Any:
    """The smaller copy that `peer` ("torch_pruning", "optipfair") makes of `model`; it may read `calibration_ids`."""
    if peer == "torch_pruning":
        from peers.torch_pruning import torch_pruning

        windows = calibration_ids[:: max(1, len(calibration_ids) // 10)]  # gradients: LLM-Pruner takes ten samples
        return torch_pruning(model, windows, ratio, **settings)
    from peers.optipfair import optipfair

    return optipfair(model, calibration_ids, ratio, **settings)
