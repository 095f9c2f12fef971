"""A.X K1: DeepSeek V3's blocks; what the experts give together is normed."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.glm4_moe_lite import FAMILY as GLM4_MOE_LITE
from slimexport.architectures.weights import DENSE, norm, where

registry.register("axk1")(
    replace(
        GLM4_MOE_LITE,
        model_type="axk1",
        block_weights=(
            *GLM4_MOE_LITE.block_weights,
            *where(f"!{DENSE}", norm("mlp.post_mlp_layernorm")),
        ),
    )
)
