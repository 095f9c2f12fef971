"""VaultGemma: Gemma 2 without the norms after attention and FFN."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.gemma2 import GEMMA2
from slimexport.architectures.weights import attention_weights, gated_ffn, norms

registry.register("vaultgemma")(
    replace(
        GEMMA2,
        model_type="vaultgemma",
        eager=True,
        block_weights=(
            *norms("input_layernorm", "pre_feedforward_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias"),
            *gated_ffn(),
        ),
        outputs_normed=False,
    )
)
