"""GLM 4.7 Flash: DeepSeek V3's blocks; which have no experts is a list."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.deepseek_v3 import FAMILY as DEEPSEEK_V3
from slimexport.architectures.weights import DENSE

FAMILY = registry.register("glm4_moe_lite")(
    replace(
        DEEPSEEK_V3,
        model_type="glm4_moe_lite",
        block_flags=lambda config, block: [DENSE] if config.mlp_layer_types[block] == "dense" else [],
    )
)
