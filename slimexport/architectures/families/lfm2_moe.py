"""LFM2 with experts in all blocks but the first."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from slimexport.architectures import registry
from slimexport.architectures.families.lfm2 import FAMILY as LFM2
from slimexport.architectures.families.lfm2 import convolution
from slimexport.architectures.weights import CHANNELS, DENSE, DENSE_CHANNELS, EXPERTS, Weight, mixed_ffn


def flags(config: Any, block: int) -> Iterator[str]:
    yield config.layer_types[block]
    if block < config.num_dense_layers:
        yield DENSE


registry.register("lfm2_moe")(
    replace(
        LFM2,
        model_type="lfm2_moe",
        block_weights=(
            *(w for w in LFM2.block_weights if not w.runs_along(CHANNELS)),
            *mixed_ffn(
                Weight("feed_forward.expert_bias", (EXPERTS,), "use_expert_bias"),
                prefix="feed_forward",
                names=("w1", "w3", "w2"),
            ),
        ),
        ffn_output="feed_forward.experts",
        ffn_factors=(),
        experts=True,
        channels_field="moe_intermediate_size",
        channels=None,
        settled={},
        block_flags=flags,
        fixed_axes=lambda config: {**convolution(config), DENSE_CHANNELS: config.intermediate_size},
        without_channels="their FFN has no experts",
    )
)
