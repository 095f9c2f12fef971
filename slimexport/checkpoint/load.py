"""Loading a checkpoint of either layout, without trusting any code in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.architectures.weights import (
    CHANNELS,
    KV_GROUPS,
    OF_HEADS,
    QUERY_HEADS,
    Axis,
    Fused,
)
from slimexport.artifacts import read_json
from slimexport.checkpoint.modeling_slimexport import PerBlockSizes
from slimexport.errors import BadInputError, reason
from slimexport.run_directory import CHECKPOINTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slimexport.architectures.base import Architecture


SIZES = (*OF_HEADS, CHANNELS, QUERY_HEADS, KV_GROUPS)  # axes whose lengths differ by block


def load(
    directory: str | Path, *, device: str = "cpu", dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads `directory` (a checkpoint, or a run directory that holds one) as (model, tokenizer), in evaluation mode.

    In a run directory the recovered checkpoint comes first. Both layouts load; no code from the directory is run.
    `dtype` None keeps the stored one. Raises BadInputError where it is no checkpoint.
    """
    from transformers import AutoTokenizer

    places = (Path(directory), *(Path(directory, name) for name in CHECKPOINTS))
    path = next((place for place in places if (place / "config.json").is_file()), None)
    if path is None:
        raise BadInputError(f"{directory} is no checkpoint: it has no config.json.")
    model = load_weights(path, dtype=dtype).to(device)
    try:
        return model, AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:
        raise BadInputError(f"{path} has no usable tokenizer: {reason(error)}") from error


def load_weights(path: Path, *, dtype: str | None = None) -> PreTrainedModel:
    """The model alone, on the CPU. Raises BadInputError where tensors are missing or of the wrong size."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype or "auto", "use_safetensors": True, "output_loading_info": True}
    untrusted = {"trust_remote_code": False}  # said, or transformers asks on the terminal
    try:
        config = AutoConfig.from_pretrained(str(path), **untrusted)
        if config.is_heterogeneous:
            model, info = per_block_class(config, path).from_pretrained(str(path), config=config, **options)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(str(path), config=config, **options, **untrusted)
    except Exception as error:
        raise BadInputError(f"{path} cannot be loaded: {reason(error)}") from error
    missing = [k for k in info["missing_keys"] if not (config.tie_word_embeddings and k == "lm_head.weight")]
    if missing or info["mismatched_keys"]:
        raise BadInputError(f"{path}: missing {missing[:1]}, mismatched {list(info['mismatched_keys'])[:1]}.")
    return model.eval().requires_grad_(False)


def per_block_class(config: Any, path: Path) -> Any:
    """The class of a model whose blocks have the sizes that `config` says."""
    from transformers import AutoModelForCausalLM

    from slimexport.architectures import architecture_of

    base = AutoModelForCausalLM._model_mapping[type(config)]
    table = per_block_table(architecture_of(config, str(path), auto=was_guessed(path)))
    return type(base.__name__, (PerBlockSizes, base), {"table": table})


def was_guessed(path: Path) -> bool:
    """Whether the checkpoint was made with a table that was read off the modules."""
    made = path / "slimexport.json"
    return made.is_file() and bool(read_json(made).get("guessed"))


def per_block_table(architecture: Architecture) -> dict[str, Any]:
    """`architecture` in the words of `PerBlockSizes.table`."""
    family = architecture.family
    # Neither the number of groups nor of heads to a group can be read off a config without a field for it.
    one_group = family.kv_groups_field is None and all(block.kv_groups == 1 for block in architecture.blocks)
    return {
        "blocks": family.blocks,
        "head_dim": architecture.head_dim,
        "query_axes": architecture.query_axes,
        "heads": family.query_heads_field,
        "groups": 1 if one_group else family.kv_groups_field,
        "channels": family.channels_field,
        "weights": {
            weight.name: [_along(axis) for axis in weight.axes]
            for weight in dict.fromkeys(w for own in architecture.by_block for w in own.block_weights())
            if weight.runs_along(*SIZES)
        },
        "attributes": dict(family.attributes),
        "reads_config": list(family.reads_config),
    }


def _along(axis: Axis) -> str | list[str] | None:
    if isinstance(axis, Fused):
        return list(axis.parts)
    return axis if axis in SIZES else None
