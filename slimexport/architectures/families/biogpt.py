"""BioGPT: learned positions, biases everywhere, a head of another name."""

from slimexport.architectures import registry
from slimexport.architectures.family import Family
from slimexport.architectures.weights import (
    POSITIONS,
    RESIDUAL,
    VOCAB,
    Weight,
    attention_weights,
    norm,
    norms,
    plain_ffn,
)

registry.register("biogpt")(
    Family(
        model_type="biogpt",
        block_weights=(
            *norms("self_attn_layer_norm", "final_layer_norm", bias="always"),
            *attention_weights(qkv_bias="always", o_bias="always", output="out_proj"),
            *plain_ffn("fc1", "fc2", bias="always"),
        ),
        model_weights=(
            Weight("biogpt.embed_tokens.weight", (VOCAB, RESIDUAL)),
            Weight("biogpt.embed_positions.weight", (POSITIONS, RESIDUAL)),
            *norm("biogpt.layer_norm", bias="always"),
            Weight("output_projection.weight", (VOCAB, RESIDUAL), "!tie_word_embeddings"),
        ),
        attention_output="self_attn.out_proj",
        ffn_output="fc2",
        ffn_factors=("fc1",),
        final_norm="biogpt.layer_norm",
        decoder="biogpt",
        blocks="biogpt.layers",
        attributes={"self_attn.num_heads": "query_heads", "self_attn.embed_dim": "query"},
        kv_groups_field=None,
        head_dim_field=None,
        positions=lambda config: config.max_position_embeddings + 2,
    )
)
