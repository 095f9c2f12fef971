"""Llama-like models whose blocks have different numbers of heads and channels.

transformers (>= 5.15) reads such sizes into `config.per_layer_config`, but its models still build every block from the
global config. `PerBlockSizes` in front of a stock class builds each block from its own. slimexport itself uses this
file, and a copy lies in every per_layer checkpoint, where
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` finds it. It needs torch and transformers.
"""

import copy
from typing import Any

from torch import nn


class PerBlockSizes:
    """Mixin: `class X(PerBlockSizes, LlamaForCausalLM)`. `blocks_path` is where the list of blocks lives."""

    blocks_path = "model.layers"

    def __init__(self, config: Any):
        # The stock constructor reads global sizes: give it a config that has nothing else (from_pretrained builds on
        # the meta device, so the blocks that are replaced below never take memory).
        plain = copy.deepcopy(config)
        plain.per_layer_config = None
        super().__init__(plain)
        path, _, name = self.blocks_path.rpartition(".")
        parent = self.get_submodule(path)
        block = type(getattr(parent, name)[0])
        # The attention implementation was settled by the stock constructor, on its own copy.
        config._attn_implementation_internal = plain._attn_implementation_internal
        built = nn.ModuleList(block(config.per_layer_config[i], i) for i in range(config.num_hidden_layers))
        setattr(parent, name, built)
        for module in self.modules():
            if hasattr(module, "config"):
                # One config object for all, so that set_attn_implementation() reaches every block.
                module.config = config
        self.post_init()
