"""The axes that weights run along, and the tables of blocks that several families share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

RESIDUAL = "residual"
QUERY = "query"  # query heads x head_dim
GATED_QUERY = "gated_query"  # query heads x 2 head_dim: of each head its query, then the gate of its output
KEY_VALUE = "key_value"  # KV groups x head_dim
CHANNELS = "channels"
QUERY_HEADS = "query_heads"  # one entry for each query head
KV_GROUPS = "kv_groups"  # one entry for each KV group
HEAD_DIM = "head_dim"  # norms over a head: the same for every head, never sliced
VOCAB = "vocab"
POSITIONS = "positions"  # learned position embeddings
EXPERTS = "experts"  # one slice for each expert, of which each keeps channels of its own
ONE = "one"
SHARED = "shared_channels"  # of an expert that sees every token; never sliced
DENSE_CHANNELS = "dense_channels"  # of an FFN without experts in a model of experts; never sliced
DENSE = "dense"  # the flag of blocks that have one
LATENT_QUERY = "latent_query"  # of attention by latents (latent.py): query heads x width of a query
LATENT_KEY_VALUE = "latent_key_value"  # query heads x (key without positions, value)
QUERY_RANK = "query_rank"  # width of the latent that queries come from; never sliced
KEY_VALUE_RANK = "key_value_rank"

OF_HEADS = (QUERY, GATED_QUERY, KEY_VALUE, LATENT_QUERY, LATENT_KEY_VALUE)


@dataclass(frozen=True)
class Fused:
    """Several axes in one dimension: all of the first, then all of the second (Phi-3: q, k, v); or in turns: what the
    first KV group has of each, then what the next group has (GPT-NeoX, Falcon 40B), and so for channels (GPT-OSS)."""

    parts: tuple[str, ...]
    turns: str | None = None  # KV_GROUPS or CHANNELS


Axis = str | Fused


def parts_of(axis: Axis) -> tuple[str, ...]:
    return axis.parts if isinstance(axis, Fused) else (axis,)


@dataclass(frozen=True)
class Weight:
    """One tensor, its dimensions in the order in which they are stored ([out, in] for Linear, [in, out] for Conv1D).

    `when` names the config field, or the flag of its block, that must be true for it to exist ("!x": must be false;
    "x and y": both).
    """

    name: str
    axes: tuple[Axis, ...]
    when: str | None = None

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(self.when.split(" and ")) if self.when else ()

    def runs_along(self, *axes: str) -> bool:
        return any(part in axes for axis in self.axes for part in parts_of(axis))

    @property
    def is_matrix(self) -> bool:
        """Whether it stands between the residual, or a latent, and heads or channels: what `ratio` is a share of."""
        outer = (RESIDUAL, QUERY_RANK, KEY_VALUE_RANK)
        return any(axis in outer for axis in self.axes) and self.runs_along(*OF_HEADS, CHANNELS)

    @property
    def is_per_expert(self) -> bool:
        """Whether it holds a matrix of every expert, of which each loses channels of its own."""
        return self.axes[:1] == (EXPERTS,) and self.runs_along(CHANNELS)

    @property
    def transposed(self) -> bool:
        """Of an output matrix: whether it is stored as [in, out]."""
        return self.axes[-1] == RESIDUAL


# Blocks ------------------------------------------------------------------------------------------------------------


def linear(name: str, out: Axis, into: Axis, bias: str | None = None, *, transposed: bool = False) -> Iterator[Weight]:
    """A linear layer. `bias` is None (never), "always", or the config field that decides. Conv1D is `transposed`."""
    yield Weight(f"{name}.weight", (into, out) if transposed else (out, into))
    if bias is not None:
        yield Weight(f"{name}.bias", (out,), None if bias == "always" else bias)


def norm(name: str, *, bias: str | None = None) -> Iterator[Weight]:
    """A norm over the residual; `bias` as in `linear`."""
    yield Weight(f"{name}.weight", (RESIDUAL,))
    if bias is not None:
        yield Weight(f"{name}.bias", (RESIDUAL,), None if bias == "always" else bias)


def norms(*names: str, bias: str | None = None) -> tuple[Weight, ...]:
    return tuple(weight for name in names for weight in norm(name, bias=bias))


def where(condition: str, weights: Iterable[Weight]) -> tuple[Weight, ...]:
    """`weights` of blocks for which `condition` holds (`Weight.when`)."""
    return tuple(replace(w, when=" and ".join((condition, *w.conditions))) for w in weights)


def attention_weights(
    prefix: str = "self_attn",
    *,
    qkv_bias: str | None = None,
    o_bias: str | None = None,
    output: str = "o_proj",
    head_norms: tuple[str, ...] = (),
    query: str = QUERY,
) -> tuple[Weight, ...]:
    """Separate q, k, v and output projections; `head_norms` are RMSNorms over a head."""
    made = [
        *linear(f"{prefix}.q_proj", query, RESIDUAL, qkv_bias),
        *linear(f"{prefix}.k_proj", KEY_VALUE, RESIDUAL, qkv_bias),
        *linear(f"{prefix}.v_proj", KEY_VALUE, RESIDUAL, qkv_bias),
        *linear(f"{prefix}.{output}", RESIDUAL, QUERY, o_bias),
    ]
    return (*made, *(Weight(f"{prefix}.{name}.weight", (HEAD_DIM,)) for name in head_norms))


def gated_ffn(
    prefix: str = "mlp",
    *,
    bias: str | None = None,
    along: str = CHANNELS,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Weight, ...]:
    """gate, up and down."""
    gate, up, down = (f"{prefix}.{name}" for name in names)
    return (
        *linear(gate, along, RESIDUAL, bias),
        *linear(up, along, RESIDUAL, bias),
        *linear(down, RESIDUAL, along, bias),
    )


def plain_ffn(into: str, out: str, *, bias: str | None = None, transposed: bool = False) -> tuple[Weight, ...]:
    """Two matrices and an activation between them."""
    return (
        *linear(into, CHANNELS, RESIDUAL, bias, transposed=transposed),
        *linear(out, RESIDUAL, CHANNELS, bias, transposed=transposed),
    )


def expert_ffn(prefix: str, router: str) -> tuple[Weight, ...]:
    """The experts' matrices, each kind in one tensor, and the router."""
    return (
        Weight(f"{router}.weight", (EXPERTS, RESIDUAL)),
        Weight(f"{prefix}.gate_up_proj", (EXPERTS, Fused((CHANNELS, CHANNELS)), RESIDUAL)),
        Weight(f"{prefix}.down_proj", (EXPERTS, RESIDUAL, CHANNELS)),
    )


def mixed_ffn(
    *more: Weight, prefix: str = "mlp", bias: str | None = None, names: tuple[str, str, str] | None = None
) -> tuple[Weight, ...]:
    """Experts, with `more` beside them, in some blocks, and in those with the flag DENSE an FFN without, which is left
    dense: its channels are of another kind than the experts'."""
    named = {} if names is None else {"names": names}
    return (
        *where(f"!{DENSE}", expert_ffn(f"{prefix}.experts", f"{prefix}.gate")),
        *where(f"!{DENSE}", more),
        *where(DENSE, gated_ffn(prefix, bias=bias, along=DENSE_CHANNELS, **named)),
    )


def gated_decoder_block(
    *, qkv_bias: str | None, o_bias: str | None, mlp_bias: str | None, qk_norm: bool = False
) -> tuple[Weight, ...]:
    """The block of Llama and its relatives: RMSNorm, separate q/k/v/o, gate/up/down. Biases as in `linear`."""
    return (
        *norms("input_layernorm", "post_attention_layernorm"),
        *attention_weights(qkv_bias=qkv_bias, o_bias=o_bias, head_norms=("q_norm", "k_norm") if qk_norm else ()),
        *gated_ffn(bias=mlp_bias),
    )


# What is outside of the blocks -------------------------------------------------------------------------------------


def model_weights(
    embedding: str = "model.embed_tokens", *norms_of_model: Weight, head_bias: str | None = None
) -> tuple[Weight, ...]:
    """Embedding, what stands between it and the head, and the head where it is not the embedding."""
    head = linear("lm_head", VOCAB, RESIDUAL, head_bias)
    return (
        Weight(f"{embedding}.weight", (VOCAB, RESIDUAL)),
        *norms_of_model,
        *(replace(w, when="!tie_word_embeddings") if w.name == "lm_head.weight" else w for w in head),
    )


DECODER_MODEL_WEIGHTS = model_weights("model.embed_tokens", *norm("model.norm"))
