"""Gemma 3, the text model: Gemma 2 with q and k normed per head."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.gemma2 import GEMMA2
from slimexport.architectures.weights import HEAD_DIM, Weight

registry.register("gemma3_text")(
    replace(
        GEMMA2,
        model_type="gemma3_text",
        eager=False,
        block_weights=(
            *GEMMA2.block_weights,
            Weight("self_attn.q_norm.weight", (HEAD_DIM,)),
            Weight("self_attn.k_norm.weight", (HEAD_DIM,)),
        ),
        heads_divide_hidden=False,
    )
)
