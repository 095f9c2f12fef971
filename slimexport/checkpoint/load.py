"""Loading a checkpoint of either layout, without trusting any code in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.checkpoint.modeling_slimexport import PerBlockSizes
from slimexport.errors import BadInputError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    directory: str | Path, *, device: str = "cpu", dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads `directory` (a checkpoint, or a run directory that holds one) as (model, tokenizer), in evaluation mode.

    Both layouts load; no code from the directory is run. `dtype` None keeps the stored one.
    Raises BadInputError where it is no checkpoint.
    """
    from transformers import AutoTokenizer

    path = Path(directory)
    if not (path / "config.json").is_file() and (path / "checkpoint" / "config.json").is_file():
        path = path / "checkpoint"
    if not (path / "config.json").is_file():
        raise BadInputError(f"{directory} is no checkpoint: it has no config.json.")
    model = load_weights(path, dtype=dtype).to(device)
    try:
        return model, AutoTokenizer.from_pretrained(str(path))
    except Exception as error:
        raise BadInputError(f"{path} has no usable tokenizer: {reason(error)}") from error


def load_weights(path: Path, *, dtype: str | None = None) -> PreTrainedModel:
    """The model alone, on the CPU. Raises BadInputError where tensors are missing or of the wrong size."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype or "auto", "use_safetensors": True, "output_loading_info": True}
    try:
        config = AutoConfig.from_pretrained(str(path))
        if config.is_heterogeneous:
            model, info = _per_block_class(config).from_pretrained(str(path), config=config, **options)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(str(path), config=config, **options)
    except Exception as error:
        raise BadInputError(f"{path} cannot be loaded: {reason(error)}") from error
    missing = [k for k in info["missing_keys"] if not (config.tie_word_embeddings and k == "lm_head.weight")]
    if missing or info["mismatched_keys"]:
        raise BadInputError(f"{path}: missing {missing[:1]}, mismatched {list(info['mismatched_keys'])[:1]}.")
    return model.eval().requires_grad_(False)


def _per_block_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from slimexport.architectures import registry

    base = AutoModelForCausalLM._model_mapping[type(config)]
    family = registry.get(config.model_type)
    return type(f"{base.__name__}PerBlock", (PerBlockSizes, base), {"blocks_path": family.blocks})
