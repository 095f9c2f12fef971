"""GLM-4-0414: as GLM, and outputs are normed."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.glm import GLM
from slimexport.architectures.weights import norms

registry.register("glm4")(
    replace(
        GLM,
        model_type="glm4",
        block_weights=(*GLM.block_weights, *norms("post_self_attn_layernorm", "post_mlp_layernorm")),
        outputs_normed=True,
    )
)
