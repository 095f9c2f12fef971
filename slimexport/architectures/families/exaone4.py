"""EXAONE 4: outputs are normed, q and k per head."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import DECODER_MODEL_WEIGHTS, attention_weights, gated_ffn, norms

registry.register("exaone4")(
    Family(
        model_type="exaone4",
        block_weights=(
            *norms("post_attention_layernorm", "post_feedforward_layernorm"),
            *attention_weights(head_norms=("q_norm", "k_norm")),
            *gated_ffn(),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        attributes={
            "self_attn.num_attention_heads": "query_heads",
            "self_attn.num_key_value_heads": "kv_groups",
            "self_attn.num_key_value_groups": "heads_per_group",
        },
        outputs_normed=True,
    )
)
