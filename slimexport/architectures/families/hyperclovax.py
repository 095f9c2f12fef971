"""HyperCLOVA X SEED Think: Granite with outputs normed, as a rule."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, gated_decoder_block, norms

registry.register("hyperclovax")(
    Family(
        model_type="hyperclovax",
        block_weights=(
            *gated_decoder_block(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
            *(replace(weight, when="use_post_norm") for weight in norms("post_norm1", "post_norm2")),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        outputs_normed=True,
        residual_multiplier=lambda config: config.residual_multiplier,
        heads_divide_hidden=True,
    )
)
