"""The `onnx` target: a directory for ONNX Runtime and onnxruntime-genai."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from slimexport.artifacts import ExportArtifact, is_quantised, remove, sha256_tree, write_json
from slimexport.errors import BadInputError, NotReproducedError
from slimexport.runtime.activations import second_moments
from slimexport.targets import passes, quantise, registry
from slimexport.targets.base import (
    Builder,
    BuilderUnsupportedError,
    BuiltGraph,
    Check,
    ExportOptions,
    save_artifact,
)
from slimexport.targets.builders import mobius
from slimexport.targets.builders.mobius import MobiusBuilder
from slimexport.targets.builders.transformers import TransformersBuilder
from slimexport.targets.files import write_config, write_tokenizer
from slimexport.targets.genai_config import genai_config
from slimexport.targets.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from slimexport.architectures.base import Architecture

_BUILDERS: tuple[Builder, ...] = (MobiusBuilder(), TransformersBuilder())
GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"
_WHOLE = "{:.1f} MB of weights are of operators that are not quantised here, and stay as they are."
_PACKAGES = ("onnx", "onnx_ir", "onnxscript", "mobius")


class OnnxTarget:
    """See `slimexport.targets.base.Target`."""

    name = "onnx"

    def check_options(self, options: ExportOptions) -> None:
        """Also where ONNX Runtime does not compute in that precision."""
        if options.precision == "bf16" and options.provider == "cpu":
            raise BadInputError("ONNX Runtime does not compute in bf16 on the CPU: use fp32, or the provider cuda.")

    def check_model(self, config: PreTrainedConfig, architecture: Architecture, options: ExportOptions) -> None:
        """Whether a builder (the only one asked for, or any) can write a graph of this family."""
        written = options.builder != "transformers" and mobius.knows(config)
        if (why := architecture.family.no_trace) and not written:
            raise BadInputError(
                f"{architecture.family.model_type} models can be pruned, but there is no graph of them: {why}. "
                "`--target safetensors` exports the checkpoint."
            )

    def export(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        options: ExportOptions,
        check: Check | None = None,
    ) -> ExportArtifact:
        directory = Path(directory)
        require(*_PACKAGES, *(("onnxruntime",) if check else ()))
        builders = [builder for builder in _BUILDERS if options.builder in ("auto", builder.name)]
        notes: list[str] = []
        for builder in builders:
            last = builder is builders[-1]
            _empty(directory)
            try:
                return _export_with(self.name, builder, model, tokenizer, directory, options, check, tuple(notes))
            except BuilderUnsupportedError as error:
                if last:
                    tried = " ".join(notes)
                    message = f"The {builder.name} builder cannot export this model: {error} {tried}"
                    raise BadInputError(message) from error
                notes.append(f"The {builder.name} builder was not used: {error}")
            except (NotReproducedError, BadInputError) as error:  # BadInputError: ONNX Runtime cannot open the graph
                if last:
                    raise
                notes.append(f"The {builder.name} builder's graph was dropped: {error}")
        raise AssertionError(options.builder)  # ExportOptions lets known names through only


def _export_with(
    target: str,
    builder: Builder,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    options: ExportOptions,
    check: Check | None,
    notes: tuple[str, ...],
) -> ExportArtifact:
    with quiet():
        graph = builder.build(model, options)
        done, left = passes.apply(graph.model, options.without)
    notes = (*notes, *graph.notes, *left)
    if graph.no_genai:
        notes = (*notes, f"No genai_config.json: {graph.no_genai}.")

    def written(graph: BuiltGraph, place: Path, precision: str) -> ExportArtifact:
        place.mkdir(exist_ok=True)
        whole = quantise.left_float(graph.model) if is_quantised(precision) else 0
        _write_files(graph, model, tokenizer, place, options)
        artifact = ExportArtifact(
            path=str(place),
            target=target,
            builder=builder.name,
            precision=precision,
            provider=options.provider,
            files=sha256_tree(place),
            inputs=graph.inputs,
            outputs=graph.outputs,
            kv_heads=graph.kv_heads,
            head_dim=graph.head_dim,
            left_padding=graph.left_padding,
            shared_kv=graph.shared_kv,
            passes=done,
            float_bytes=whole,
            notes=(*notes, _WHOLE.format(whole / 1e6)) if whole else notes,
        )
        save_artifact(artifact)
        return artifact

    if options.quantised:
        return _quantised(graph, directory, options, check, written)
    artifact = written(graph, directory, options.precision)
    if check:
        check(artifact)
    return artifact


def _quantised(
    graph: BuiltGraph,
    directory: Path,
    options: ExportOptions,
    check: Check | None,
    written: Callable[[BuiltGraph, Path, str], ExportArtifact],
) -> ExportArtifact:
    """Four checks, each with the tolerance that it can have: the float graph against the model; every quantised weight
    against its own; the file's graph, but for the rounding of activations, against the float graph with the numbers
    that the weights stand for; and with that rounding, whose noise says little about single faults."""
    first, second = directory / ".first", directory / ".second"
    scheme, moments = quantise.SCHEMES[options.precision], None
    measured = {} if options.text is None else quantise.inputs_to_measure(graph.model)
    try:
        if check or measured:
            made = written(graph, first, options.float_precision)
            if check:
                check(made)
            if measured and options.text is not None:
                moments = second_moments(first, measured, options.text, provider=options.provider)
            remove(first)
        plain = graph.model.clone()
        with quiet():
            sources = quantise.quantise(graph.model, scheme, moments)
        artifact = written(graph, directory, options.precision)
        quantise.check_quantised(directory / GRAPH, sources)
        if check:
            quantise.put_levels(plain, graph.model)
            reference = written(dataclasses.replace(graph, model=plain), first, options.float_precision)
            check(_exact(artifact, second, options.float_precision), reference)
            check(artifact, reference)
    finally:
        remove(first)
        remove(second)
    return artifact


def _exact(artifact: ExportArtifact, place: Path, precision: str) -> ExportArtifact:
    """In `place` the same files and weights, with activations that are not rounded."""
    import onnx_ir

    place.mkdir()
    directory = Path(artifact.path)
    for name in artifact.files:
        if name != GRAPH:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(directory / name, place / name)  # the very bytes
            except OSError:  # a file system without links
                shutil.copy2(directory / name, place / name)
    model = onnx_ir.load(directory / GRAPH)
    quantise.without_rounded_activations(model)
    onnx_ir.save(model, place / GRAPH)
    exact = dataclasses.replace(artifact, path=str(place), precision=precision)
    save_artifact(exact)
    return exact


def _write_files(
    graph: BuiltGraph,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    place: Path,
    options: ExportOptions,
) -> None:
    import onnx_ir

    with quiet():
        onnx_ir.save(graph.model, str(place / GRAPH), external_data=WEIGHTS)
        write_config(model, place)
        write_tokenizer(tokenizer, place)
    if not graph.no_genai:
        write_json(place / "genai_config.json", genai_config(model, tokenizer, graph, options))


def require(*packages: str) -> None:
    """Raises BadInputError for the first that is not installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise BadInputError(f"Exporting to ONNX needs the package {name!r}: pip install 'slimexport[cpu]'.")


def _empty(directory: Path) -> None:
    """What an earlier builder left behind must not be shipped."""
    for path in directory.iterdir():
        remove(path)


registry.register("onnx")(OnnxTarget())
