"""The `gguf` target: `model.gguf` for llama.cpp, which has opened it and computes from it what the model computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from slimexport.artifacts import ExportArtifact, remove, sha256_tree
from slimexport.errors import BadInputError
from slimexport.targets import registry
from slimexport.targets.base import Check, ExportOptions, save_artifact, without_graph
from slimexport.targets.gguf import file
from slimexport.targets.gguf import precision as numbers
from slimexport.targets.gguf.architecture import Fields, Kind, header, kind_of
from slimexport.targets.gguf.pre_tokenizer import pre_tokenizer_of
from slimexport.targets.gguf.tensors import Tensors, tensors_of
from slimexport.targets.gguf.vocabulary import vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from slimexport.architectures.base import Architecture

MODEL = "model.gguf"
_WHOLE = "{:.1f} MB of weights have rows that are no multiple of {}, and stay in float16."


@dataclass(frozen=True)
class _Content:
    """What goes into a file, whatever the precision."""

    kind: Kind
    fields: Fields
    tensors: Tensors

    def write(self, place: Path, precision: str) -> None:
        fields = self.of(precision)
        file.write(place / MODEL, self.kind.name, fields, self.tensors, precision)
        file.check(place / MODEL, self.kind.name, fields, self.tensors, precision)

    def of(self, precision: str) -> Fields:
        return {**self.fields, "general.file_type": numbers.file_type(precision)}

    def left_float(self, precision: str) -> int:
        """Bytes of matrices that a quantised file has in float16."""
        kinds = {name: numbers.type_of(name, array, precision) for name, array in self.tensors.items()}
        return sum(2 * array.size for name, array in self.tensors.items() if kinds[name].name == "F16")


class GgufTarget:
    """See `slimexport.targets.base.Target`."""

    name = "gguf"
    rounds_by_text = False  # but by llama.cpp's rules

    def check_options(self, options: ExportOptions) -> None:
        """Also whether llama.cpp is there, without which no file is known to be right."""
        from slimexport.runtime import llama_api

        if options.provider != "cpu":
            raise BadInputError(f"GGUF files are checked and measured on the CPU here, not on {options.provider}.")
        llama_api.require()

    def check_model(self, config: PreTrainedConfig, architecture: Architecture, options: ExportOptions) -> None:
        """Whether llama.cpp computes such a model, with blocks as the layout lets them be."""
        kind_of(config, architecture, options.per_layer)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        """Whether llama.cpp's tokenizer can be this one."""
        pre_tokenizer_of(tokenizer, vocabulary_of(tokenizer, vocabulary))

    def export(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        options: ExportOptions,
        check: Check | None = None,
    ) -> ExportArtifact:
        from slimexport.architectures import architecture_of

        self.check_options(options)
        directory = Path(directory)
        architecture = architecture_of(model.config, str(directory))
        kind = kind_of(model.config, architecture, per_layer=False)
        vocabulary = vocabulary_of(tokenizer, architecture.vocab)
        pre, cut = pre_tokenizer_of(tokenizer, vocabulary)
        fields = {**header(model.config, architecture, kind), **vocabulary.fields(), **cut}
        content = _Content(kind, fields, tensors_of(model, architecture, kind))
        whole = content.left_float(options.precision) if options.quantised else 0
        notes = (f"llama.cpp's architecture {kind.name}, pre-tokenizer {pre}.", *vocabulary.notes)
        artifact = replace(
            without_graph(self.name, "gguf", architecture, directory, options),
            float_bytes=whole,
            notes=(*notes, _WHOLE.format(whole / 1e6, numbers.BLOCK)) if whole else notes,
        )
        if options.quantised:
            return _quantised(content, artifact, check)
        artifact = _written(content, artifact, directory, options.precision)
        if check:
            check(artifact)
        return artifact


def _quantised(content: _Content, artifact: ExportArtifact, check: Check | None) -> ExportArtifact:
    """Three checks, each with the tolerance that it can have: the float32 file against the model; every quantised
    number of the file, and its metadata, against what they were made from; and what llama.cpp makes of the file, with
    activations that it rounds to 8 bits, against what it makes of the same numbers in float32."""
    directory = Path(artifact.path)
    other = directory / ".other"
    try:
        if check:
            check(_written(content, artifact, other, "fp32"))
            remove(other)
        made = _written(content, artifact, directory, artifact.precision)
        if check:
            shapes = {name: array.shape for name, array in content.tensors.items()}
            meant = replace(content, tensors=file.meant(directory / MODEL, shapes))
            check(made, _written(meant, artifact, other, "fp32"))
    finally:
        remove(other)
    return made


def _written(content: _Content, artifact: ExportArtifact, place: Path, precision: str) -> ExportArtifact:
    place.mkdir(exist_ok=True)
    content.write(place, precision)
    files = sha256_tree(place)
    made = replace(artifact, path=str(place), precision=precision, files=files)
    save_artifact(made)
    return made


registry.register("gguf")(GgufTarget())
