"""Apertus: q and k normed per head, an FFN without gate whose activation is learned."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    DECODER_MODEL_WEIGHTS,
    ONE,
    Weight,
    attention_weights,
    norms,
    plain_ffn,
    where,
)

APERTUS = registry.register("apertus")(
    Family(
        model_type="apertus",
        block_weights=(
            *norms("attention_layernorm", "feedforward_layernorm"),
            *attention_weights(qkv_bias="attention_bias", o_bias="attention_bias", head_norms=("q_norm", "k_norm")),
            *plain_ffn("mlp.up_proj", "mlp.down_proj"),
            *where("xielu", (Weight(f"mlp.act_fn.{name}", (ONE,)) for name in ("alpha_p", "alpha_n"))),
            *where("xielu", (Weight(f"mlp.act_fn.{name}", ()) for name in ("beta", "eps"))),
        ),
        model_weights=DECODER_MODEL_WEIGHTS,
        ffn_factors=("mlp.up_proj",),
        flags=lambda config: ["xielu"] if config.hidden_act == "xielu" else [],
    )
)
