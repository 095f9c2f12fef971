"""OptiPFair (arXiv 2512.22671): channels of gated FFNs by the range of their weights, or times their activations.

pip install --no-deps optipfair==0.4.2
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from peers import FFN, TOLERANCE, block_parameters
from slimexport.errors import BadInputError


def optipfair(
    model: Any, calibration_ids: torch.Tensor, ratio: float, *, method: str = "MAW", protected: tuple[int, int] = (2, 1)
) -> Any:
    """A smaller copy of `model` (Llama modules, float32), by OptiPFair's own `prune_model`.

    It takes the same share of FFN channels from every block it is given, and no heads: the FFN makes up the whole
    `ratio` of the block linear parameters. `method` is MAW with the activations of `calibration_ids` int64 [n, w] (its
    data-driven mode), or L2, PON, VOW, which read no text; `protected` blocks at the beginning and at the end lose
    nothing. Nothing is compensated. Its other mode, removing whole blocks, is another structure than that of the table.

    The settings were chosen on development text as our own were (SmolLM2-135M, 10 windows, perplexity over dense on
    4,000 tokens; an indication, no result):

                                     30 %    50 %
        MAW, nothing protected       3.03      18
        MAW, protected=(4, 2)        2.57      20
        MAW, protected=(2, 1)        2.50     7.8
        L2, protected=(4, 2)           41     477
        L2, PON, VOW                > 900  > 20,000

    Raises BadInputError where the library is missing or the ratio cannot be met.
    """
    try:
        from optipfair import prune_model
    except ImportError:
        raise BadInputError("This peer needs: pip install --no-deps optipfair==0.4.2") from None
    small = copy.deepcopy(model).float().eval()
    before, blocks = block_parameters(small), list(range(len(small.model.layers)))
    open_blocks = blocks[protected[0] : len(blocks) - protected[1]]
    channels = sum(small.model.layers[i].mlp.get_submodule(name).weight.numel() for i in open_blocks for name in FFN)
    share = ratio * before / channels
    if share >= 1:
        raise BadInputError(f"The FFNs of {len(open_blocks)} blocks do not hold {ratio:.0%} of the parameters.")
    batches = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in calibration_ids]
    small = prune_model(
        small,
        neuron_selection_method=method,
        pruning_percentage=100 * share,
        layer_indices=open_blocks,
        dataloader=batches if method == "MAW" else None,
        show_progress=False,
    )
    for block in small.model.layers:
        block.mlp.intermediate_size = block.mlp.gate_proj.out_features
    reached = 1 - block_parameters(small) / before
    if abs(reached - ratio) > TOLERANCE:
        raise BadInputError(f"OptiPFair removed {reached:.2%} of the block linear parameters, {ratio:.2%} wanted.")
    return small
