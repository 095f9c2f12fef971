"""Writing a checkpoint, and the proof that a fresh process reads it back."""

from __future__ import annotations

import pprint
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from slimexport.architectures.base import Architecture
from slimexport.artifacts import (
    PruningPlan,
    ShrunkCheckpoint,
    read_json,
    sha256_tree,
    write_json,
    write_text,
)
from slimexport.checkpoint import modeling_slimexport
from slimexport.checkpoint.card import CARD
from slimexport.checkpoint.load import per_block_table
from slimexport.errors import NotReproducedError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slimexport.pruning.blocks import BlockSource

PROBE_TOKENS = 64


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    architecture: Architecture,
    plan: PruningPlan,
    directory: Path,
    *,
    card: str,
    blocks: BlockSource | None = None,
) -> dict[str, str]:
    """Writes weights (safetensors), config, generation config, tokenizer, chat template and model card.

    `directory` exists and is empty; the model is in its stored precision, `blocks` are those of it that are not in
    memory. Returns name -> sha256, but for the card, which is written again once the model was measured.
    """
    made = {"ratio": plan.ratio, "criterion": plan.criterion, "allocation": plan.allocation, "layout": plan.layout}
    write_model(model, tokenizer, architecture, directory, made, blocks)
    write_text(directory / CARD, card)
    return {name: digest for name, digest in sha256_tree(directory).items() if name != CARD}


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    architecture: Architecture,
    directory: Path,
    made: Mapping[str, Any] = MappingProxyType({}),
    blocks: BlockSource | None = None,
) -> None:
    """What `load` reads. `architecture` is that of `model`, `made` says how it came about."""
    import transformers

    if blocks is not None and blocks.streamed:
        _save_streamed(model, architecture.family.blocks, blocks, directory)
    else:
        model.save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))
    _keep_sentencepiece(tokenizer, directory)
    path = directory / "config.json"
    data = read_json(path)
    _add_old_rope_fields(data)
    data.pop("auto_map", None)  # of the checkpoint that this one was made from
    if "per_layer_config" in data:
        module, base, inner = modeling_slimexport.__name__.rpartition(".")[2], type(model), type(model.base_model)
        table = per_block_table(architecture)
        classes = {"AutoModelForCausalLM": (base.__name__, table)}
        if hasattr(transformers, inner.__name__):
            # vLLM's transformers backend, and whoever wants hidden states, asks for the model without its head.
            blocks = table["blocks"].removeprefix(f"{model.base_model_prefix}.")
            classes["AutoModel"] = (inner.__name__, {**table, "blocks": blocks})
        data["auto_map"] = {auto: f"{module}.{name}" for auto, (name, _) in classes.items()}
        write_text(directory / "modeling_slimexport.py", _modelling_file(dict(classes.values())))
    write_json(path, data)
    facts = {"schema_version": 1, **made, "guessed": architecture.family.guessed}
    write_json(directory / "slimexport.json", facts)
    for file in directory.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # transformers writes weights for the owner's eyes only


def _save_streamed(model: PreTrainedModel, where: str, blocks: BlockSource, directory: Path) -> None:
    """What `save_pretrained` writes, with one block in memory at a time."""
    from slimexport.streaming.files import SINGLE, Wanted, write_tensors

    model.save_pretrained(str(directory), state_dict={})
    (directory / SINGLE).unlink(missing_ok=True)
    stored = model.state_dict(keep_vars=True)
    once = {id(tensor): name for name, tensor in reversed(stored.items())}  # a tied head is the embedding's
    kept = {name: tensor for name, tensor in stored.items() if once[id(tensor)] == name}
    wanted = {name: Wanted(tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()}
    inside = f"{where}."

    def batches() -> Iterator[Mapping[str, torch.Tensor]]:
        yield {name: tensor for name, tensor in kept.items() if not name.startswith(inside)}
        for index in range(len(blocks)):
            block = blocks.load(index)
            yield {f"{inside}{index}.{name}": tensor for name, tensor in block.state_dict().items()}
            blocks.release(index)

    write_tensors(directory, wanted, batches())


def _keep_sentencepiece(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """transformers 5 writes tokenizer.json alone; llama.cpp's converter wants Gemma's and other families' own file."""
    given = Path(str(tokenizer.name_or_path), "tokenizer.model")
    kept = directory / given.name
    if given.is_file() and not kept.exists():
        shutil.copyfile(given, kept)


def _add_old_rope_fields(data: dict[str, Any]) -> None:
    """transformers 5 writes `rope_parameters`; transformers 4, vLLM and llama.cpp read the older two fields."""
    rope = data.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        data.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            data.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})


def _modelling_file(tables: dict[str, dict[str, Any]]) -> str:
    """One class for each stock class that is named."""
    source = Path(modeling_slimexport.__file__).read_text(encoding="utf-8")
    for base, table in tables.items():
        literal = pprint.pformat(table, indent=4, width=100, sort_dicts=False).replace("\n", "\n    ")
        source += f"\n\nclass {base}(PerBlockSizes, transformers.{base}):\n    table = {literal}\n"
    return source


def check_round_trip(
    model: PreTrainedModel, directory: Path, seed: int, blocks: BlockSource | None = None, *, whole: bool = True
) -> float:
    """Loads `directory` in a fresh process and compares logits with those of `model` (CPU, stored precision).

    `blocks` are those of the model that are not in memory. The fresh process loads the model as `load` does, or, where
    it is not to have it in memory as a `whole`, block by block.

    Returns the largest absolute difference, which is 0.0; raises NotReproducedError where it is not.
    """
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (1, PROBE_TOKENS), generator=generator)
    with torch.no_grad(), blocks.running() if blocks else nullcontext():
        expected = model(ids, use_cache=False).logits
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch, "ids.safetensors"), Path(scratch, "logits.safetensors")
        save_file({"ids": ids}, given)
        threads = torch.get_num_threads()
        words = [*map(str, (directory, given, made, threads)), *([] if whole else ["streamed"])]
        result = subprocess.run(
            # -P: the user's working directory is no place to import from
            [sys.executable, "-P", "-m", "slimexport.checkpoint.probe", *words],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if result.returncode:
            reason = (result.stderr.strip() or "no message").splitlines()[-1]
            raise NotReproducedError(f"The checkpoint does not load in a fresh process: {reason}")
        logits = load_file(made)["logits"]
    if logits.shape != expected.shape or not torch.equal(logits, expected):
        difference = float((logits - expected).abs().max()) if logits.shape == expected.shape else float("inf")
        raise NotReproducedError(
            f"The reloaded checkpoint differs from the model in memory: logits by up to {difference:.3g}."
        )
    return 0.0


def checkpoint_artifact(
    directory: Path, architecture: Architecture, files: dict[str, str], difference: float
) -> ShrunkCheckpoint:
    weights = sum((directory / name).stat().st_size for name in files if name.endswith(".safetensors"))
    return ShrunkCheckpoint(
        path=str(directory),
        parameters=architecture.estimates(1).parameters,
        bytes=weights,
        files=files,
        max_logit_difference=difference,
    )
