"""The files beside the graph, so that the exported directory stands alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.artifacts import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# onnxruntime-genai does not know transformers 5's generic class name; both read the same tokenizer.json.
_TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
# They say where a model was loaded from, or need files that are not exported.
_NOT_OF_THE_EXPORT = ("auto_map", "quantization_config", "_name_or_path", "_model_name_or_path")
_NOT_OF_THE_TOKENIZER = ("auto_map", "is_local", "local_files_only", "name_or_path")


def write_config(model: PreTrainedModel, directory: Path) -> None:
    """`config.json` and `generation_config.json`, without what belongs to the place the model came from."""
    config: dict[str, Any] = model.config.to_diff_dict()
    for name in _NOT_OF_THE_EXPORT:
        config.pop(name, None)
    if "per_layer_config" in config:
        # Without it transformers refuses even to read the config: its validators ask for the global sizes.
        config["allow_global_per_layer_attribute_access"] = True
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])  # where readers before transformers 5 look for it
    write_json(directory / "config.json", config)
    if model.generation_config is not None:
        generation = model.generation_config.to_diff_dict()
        for name in _NOT_OF_THE_EXPORT:
            generation.pop(name, None)
        write_json(directory / "generation_config.json", generation)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """The tokenizer's own files, readable by transformers and by onnxruntime-genai."""
    tokenizer.save_pretrained(str(directory))
    path = directory / "tokenizer_config.json"
    if not path.exists():
        return
    config = read_json(path)
    for name in _NOT_OF_THE_TOKENIZER:
        config.pop(name, None)
    name = config.get("tokenizer_class")
    config["tokenizer_class"] = _TOKENIZER_CLASSES.get(name, name)
    write_json(path, config)
