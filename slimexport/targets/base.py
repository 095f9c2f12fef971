"""The contract of a target, and of the graph builders behind the ONNX target."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from slimexport.artifacts import MANIFEST, ExportArtifact, from_dict, is_quantised, read_json, to_dict, write_json
from slimexport.errors import BadInputError
from slimexport.providers import PROVIDERS

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from slimexport.architectures.base import Architecture

BUILDERS = ("auto", "mobius", "transformers")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "int4-mixed")


class Check(Protocol):
    def __call__(self, artifact: ExportArtifact, reference: ExportArtifact | None = None) -> None:
        """Raises NotReproducedError when the graph in `artifact.path` does not compute what the model computes, or what
        the graph `reference` computes where there is one; BadInputError when ONNX Runtime cannot open it."""


@dataclass(frozen=True)
class ExportOptions:
    """How to export. `builder` auto tries the builders in order; `provider` is what the graph is optimised for;
    `without` names passes over the graph (`targets/passes/`) that are left out. The int precisions are those of the
    weights alone: `float_precision` is everything else's. `per_layer`: blocks may come to differ in size. By `text`,
    token ids int64 [windows, tokens], a graph's weights of few bits are rounded; without it to the nearest."""

    builder: str = "auto"
    precision: str = "fp32"
    provider: str = "cpu"
    without: tuple[str, ...] = ()
    per_layer: bool = False
    text: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("exporter", self.builder, BUILDERS),
            ("precision", self.precision, PRECISIONS),
            ("provider", self.provider, tuple(PROVIDERS)),
        ):
            if value not in known:
                raise BadInputError(f"{name} must be one of {', '.join(known)}, not {value!r}.")

    @property
    def quantised(self) -> bool:
        return is_quantised(self.precision)

    @property
    def float_precision(self) -> str:
        if not self.quantised:
            return self.precision
        return "fp16" if PROVIDERS[self.provider].device == "cuda" else "fp32"


class Target(Protocol):
    """Writes one deployable directory, which `slimexport.runtime.open_decoder` can open."""

    def check_options(self, options: ExportOptions) -> None:
        """Raises BadInputError for options that go with no model: called before minutes of pruning."""
        ...

    def check_model(self, config: PreTrainedConfig, architecture: Architecture, options: ExportOptions) -> None:
        """Raises BadInputError for a model that cannot be exported, as its config shows: called before pruning."""
        ...

    def export(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        options: ExportOptions,
        check: Check | None = None,
    ) -> ExportArtifact:
        """Exports `model` (evaluation mode, any device) into `directory`, which exists and is empty.

        `check`, where given, is called on the finished directory and decides whether it may leave.

        Raises:
            BadInputError: nothing here can export this model with these options, or a package is missing.
            NotReproducedError: whatever `check` raised for the last builder that was tried.
        """
        ...


@runtime_checkable
class ChecksTokenizer(Protocol):
    """A target that cannot take every tokenizer."""

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        """Raises BadInputError for a tokenizer that cannot be exported, with a model of `vocabulary` tokens: called
        before pruning."""
        ...


def without_graph(
    target: str, builder: str, architecture: Architecture, directory: Path, options: ExportOptions
) -> ExportArtifact:
    """The manifest, before there are files, of an export that its own runtime calls and no graph's names do."""
    return ExportArtifact(
        path=str(directory),
        target=target,
        builder=builder,
        precision=options.precision,
        provider=options.provider,
        files={},
        inputs=(),
        outputs=(),
        kv_heads=tuple(block.kv_groups for block in architecture.blocks),
        head_dim=architecture.head_dim,
        left_padding=True,
    )


def save_artifact(artifact: ExportArtifact) -> None:
    """Writes the manifest into the directory, which may move (staging, a copy to a server): the same model gives the
    same bytes."""
    write_json(Path(artifact.path) / MANIFEST, to_dict(dataclasses.replace(artifact, path=".")))


def load_artifact(directory: Path) -> ExportArtifact:
    """Reads the manifest of an exported directory, wherever that stands now.

    Raises BadInputError where it is missing or not valid. The files are not compared with their sums here.
    """
    path = Path(directory) / MANIFEST
    artifact = from_dict(ExportArtifact, read_json(path), str(path))
    return dataclasses.replace(artifact, path=str(directory))


@dataclass(frozen=True)
class BuiltGraph:
    """The graph with its weights, in memory, and how to call it."""

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kv_heads: tuple[int, ...]  # per block; 0: it has states instead
    query_heads: int  # the largest of all blocks
    head_dim: int
    left_padding: bool
    shared_kv: bool  # every block writes its KV in place (GroupQueryAttention), so past and present may share memory
    notes: tuple[str, ...] = ()
    convolved: int = 0  # positions that the state of a convolution holds, in blocks that have no other state
    no_genai: str = ""  # why onnxruntime-genai cannot call it


class BuilderUnsupportedError(BadInputError):
    """This builder cannot build this model; another one may."""


class Builder(Protocol):
    """Turns a model into a graph.

    The graph's contract, whoever builds it (b = batch, t = new tokens, p = past tokens, n = block):
        inputs   input_ids int64 [b, t], attention_mask int64 [b, p + t], position_ids int64 [b, t] (only where the
                 graph reads it), past_key_values.n.key and .value [b, kv_heads of n, p, head_dim]
        outputs  logits [b, t, vocabulary], present.n.key and .value [b, kv_heads of n, p + t, head_dim]
    Where keys and values come from a latent, that is the key, and the key that turns with positions is the value, each
    of its own width (`BuiltGraph.head_dim` is that of the key).
    A block with a convolution or linear attention has past_key_values.n.conv_state or .recurrent_state, of fixed sizes
    and zero at the beginning, and the same as present.
    b, t and p are dynamic and p may be 0: one graph serves prefill, decode and chunked prefill.
    """

    name: str

    def build(self, model: PreTrainedModel, options: ExportOptions) -> BuiltGraph:
        """Raises BuilderUnsupportedError with the reason, in words for the user."""
        ...
