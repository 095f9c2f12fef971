"""MiniCPM 3: Youtu's block; what it adds to the residual is scaled by the depth."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.youtu import FAMILY as YOUTU

registry.register("minicpm3")(
    replace(
        YOUTU,
        model_type="minicpm3",
        residual_multiplier=lambda config: config.scale_depth / config.num_hidden_layers**0.5,
        heads_divide_hidden=True,
    )
)
