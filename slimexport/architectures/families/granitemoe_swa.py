"""Granite with experts and sliding windows: attention has a sink in every query head."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.granitemoeshared import GRANITEMOESHARED
from slimexport.architectures.weights import QUERY_HEADS, Weight

registry.register("granitemoe_swa")(
    replace(
        GRANITEMOESHARED,
        model_type="granitemoe_swa",
        eager=True,
        block_weights=(*GRANITEMOESHARED.block_weights, Weight("self_attn.sinks", (QUERY_HEADS,))),
    )
)
