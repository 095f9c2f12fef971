"""Which of llama.cpp's architectures computes a model exactly, and what the file says of its sizes.

`llama` reads one size for all blocks. `deci` is the same computation (RMS norms, rotary positions, gated SiLU), made
for models whose blocks differ: its counts of heads and channels may be lists. In both, q and k are turned in pairs of
neighbours; `qwen3` turns halves, as transformers does. A Qwen 2 model is a Llama with biases on q, k and v, and
llama.cpp's own `qwen2` wants heads that are together as wide as the residual, which those of a pruned model are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimexport.errors import BadInputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedConfig, PreTrainedModel

    from slimexport.architectures.base import Architecture

Fields = dict[str, Any]
"""The file's metadata: str, bool, int (uint32), float (float32), or a list of one of these."""


@dataclass(frozen=True)
class Kind:
    """`name` is llama.cpp's; `factors`: it reads a factor for every rotary frequency."""

    name: str
    neighbours: bool
    factors: bool


_LLAMA, _DECI = Kind("llama", True, True), Kind("deci", True, True)
_QWEN3 = Kind("qwen3", False, False)
_KINDS: dict[str, tuple[Kind, Kind | None]] = {
    "llama": (_LLAMA, _DECI),
    "mistral": (_LLAMA, _DECI),
    "qwen2": (_LLAMA, _DECI),
    "qwen3": (_QWEN3, None),
}
"""model_type -> where all blocks are alike, where they differ."""

_ROPES = ("default", "linear", "llama3")  # those that are nothing but other frequencies


def kind_of(config: PreTrainedConfig, architecture: Architecture, per_layer: bool) -> Kind:
    """Where blocks may differ (`per_layer`), or do. Raises BadInputError, with the reason, where llama.cpp has nothing
    that computes this model."""
    kinds = _KINDS.get(config.model_type)
    if kinds is None:
        known = ", ".join(_KINDS)
        raise BadInputError(f"{config.model_type} models are not written as GGUF: {known} are.")
    alike, differing = kinds
    differ = per_layer or any(block != architecture.blocks[0] for block in architecture.blocks)
    kind = differing if differ else alike
    if kind is None:
        raise BadInputError(
            f"llama.cpp has no {config.model_type} model whose blocks differ in size, so none is written as GGUF: "
            "--layout uniform makes them alike."
        )
    if why := _unlike(config, architecture, kind):
        raise BadInputError(f"This {config.model_type} model is not written as GGUF: {why}.")
    return kind


def _unlike(config: Any, architecture: Architecture, kind: Kind) -> str | None:
    """What llama.cpp would compute otherwise."""
    if config.hidden_act != "silu":
        return f"its FFN has {config.hidden_act}, llama.cpp's has silu"
    window = getattr(config, "sliding_window", None)
    slides = getattr(config, "layer_types", None) is None or "sliding_attention" in config.layer_types
    if window is not None and slides and window < config.max_position_embeddings:
        return f"it attends to a window of {window} tokens, llama.cpp's {kind.name} to all"
    rope = _rope(config)
    if rope["rope_type"] not in (_ROPES if kind.factors else _ROPES[:1]):
        return f"its rotary positions are scaled as {rope['rope_type']}, which is not checked for {kind.name}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "only a part of each head turns with the position"
    if any(block.channels == 0 for block in architecture.blocks):
        return "a block has no channels, and llama.cpp leaves out its attention then"
    return None


def _rope(config: Any) -> dict[str, Any]:
    said = config.rope_parameters or {}
    return {"rope_type": "default", "rope_theta": 10000.0, **said}


def header(config: PreTrainedConfig, architecture: Architecture, kind: Kind) -> Fields:
    """Sizes and constants of the model, under llama.cpp's names."""
    blocks = architecture.blocks
    heads, groups, channels = (
        [block.query_heads for block in blocks], [block.kv_groups for block in blocks],
        [block.channels for block in blocks],
    )  # fmt: skip

    def said(counts: list[int]) -> int | list[int]:
        return counts if kind is _DECI else counts[0]

    own = {
        "context_length": config.max_position_embeddings,
        "embedding_length": architecture.hidden,
        "block_count": len(blocks),
        "vocab_size": architecture.vocab,
        "feed_forward_length": said(channels),
        "attention.head_count": said(heads),
        "attention.head_count_kv": said(groups),
        "attention.key_length": architecture.head_dim,
        "attention.value_length": architecture.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": architecture.head_dim,
        "rope.freq_base": float(_rope(config)["rope_theta"]),
    }
    return {"general.type": "model", **{f"{kind.name}.{key}": value for key, value in own.items()}}


def rope_factors(model: PreTrainedModel, config: PreTrainedConfig) -> NDArray[np.float32] | None:
    """What llama.cpp divides the angle of each frequency by, float32 [head_dim / 2]; None where it is 1 for all.

    They are those of the model in memory, whatever scaling made them. Raises BadInputError for one that scales the
    attention too.
    """
    import numpy as np

    rotary: Any = model.get_submodule("model.rotary_emb")
    if rotary.attention_scaling != 1.0:
        raise BadInputError("The model's rotary positions scale its attention, which is not written as GGUF.")
    own = rotary.inv_freq.double().cpu().numpy()
    plain = float(_rope(config)["rope_theta"]) ** (-np.arange(len(own)) / len(own))
    factors = plain / own
    if np.allclose(factors, 1, rtol=1e-5):
        return None
    return factors.astype(np.float32)
