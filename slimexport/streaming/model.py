"""A model of which only what is in no block is in memory: embedding, positions, final norm, head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slimexport.errors import BadInputError
from slimexport.precisions import stays_in_float32
from slimexport.pruning.shrink import put
from slimexport.streaming.files import TensorFiles

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from slimexport.architectures.base import Architecture

HEAD = "lm_head.weight"


def streamable(directory: Path, architecture: Architecture) -> TensorFiles | None:
    """The files, where each of the model's tensors is in them under its own name and in its own shape.

    None where some are not: transformers turns tensors of other names and forms into its own as it loads them, and
    what is wrong with the files is said by whoever loads them whole.
    """
    try:
        files = TensorFiles(directory)
    except BadInputError:
        return None
    shapes = architecture.shapes()
    same = all(name in files and files.places[name].shape == shape for name, shape in shapes.items())
    surplus = set(files.places) - set(shapes)
    if same and architecture.tied and HEAD in surplus and _is_embedding(files, architecture):
        surplus.remove(HEAD)
    return files if same and not surplus else None


def _is_embedding(files: TensorFiles, architecture: Architecture) -> bool:
    """Whether the head in the files is what the config says: where not, transformers does not tie it."""
    inside = f"{architecture.family.blocks}."
    return any(files.same(HEAD, name) for name in architecture.shapes() if not name.startswith(inside))


def skeleton(
    kind: Any,
    config: PreTrainedConfig,
    architecture: Architecture,
    files: TensorFiles,
    dtype: torch.dtype,
    directory: Path,
    **options: Any,
) -> PreTrainedModel:
    """The model with its blocks on the meta device, in evaluation mode.

    `kind` is a model's class, or AutoModelForCausalLM; `options` are those of its `from_config`.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import GenerationConfig

    build = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = build(config, dtype=dtype, **options)
    # Tables that are computed and not stored were so in `dtype`, where transformers does it in float32.
    for module in model.modules():
        if next(module.parameters(), None) is None and next(module.buffers(), None) is not None:
            model._init_weights(module)
    inside = f"{architecture.family.blocks}."
    model.tie_weights()
    for name, _ in list(model.named_parameters()):
        if not name.startswith(inside):
            kept = torch.float32 if stays_in_float32(model, name, dtype) else dtype
            put(model, name, files.read(name).to(kept))
    for name, _ in list(model.named_buffers()):
        if not name.startswith(inside) and name in files:
            put(model, name, files.read(name))
    model.tie_weights()
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(directory))
    return model.eval().requires_grad_(False)


def mapped_in_float32(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """`model`, whose weights are float32 from here on and lie, where they were not, in a file in `directory`, mapped:
    the system reads them from there when they are looked at, and no copy is in memory. The file has to stay."""
    from safetensors import safe_open

    from slimexport.streaming.files import SHARD_BYTES, Wanted, files_of, write_tensors

    stored = {id(tensor): (name, tensor) for name, tensor in reversed(list(model.named_parameters()))}  # tied ones once
    narrow = {name: tensor for name, tensor in stored.values() if tensor.dtype in (torch.float16, torch.bfloat16)}
    if not narrow:
        return model
    directory.mkdir(parents=True)
    wanted = {name: Wanted(torch.float32, tuple(tensor.shape)) for name, tensor in narrow.items()}
    write_tensors(
        directory, wanted, ({name: tensor.data.float()} for name, tensor in narrow.items()), shard_bytes=SHARD_BYTES
    )
    for path in files_of(directory):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                narrow[name].data = file.get_tensor(name)
    for name, buffer in list(model.named_buffers()):
        if buffer.dtype in (torch.float16, torch.bfloat16):
            put(model, name, buffer.float())
    model.config.dtype = torch.float32
    return model
