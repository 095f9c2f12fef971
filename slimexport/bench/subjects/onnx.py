"""Exported graphs, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slimexport.artifacts import read_json
from slimexport.run_directory import exports_in
from slimexport.runtime import GRAPH, OnnxDecoder

if TYPE_CHECKING:
    import onnx_ir as ir

    from slimexport.bench.settings import Settings

kind = "onnx"


def find(path: Path) -> list[Path]:
    """The exported directory; of a run directory every one, and the baselines."""
    if path.is_file():
        return [path.parent] if path.name == GRAPH else []
    return exports_in(path, GRAPH)


def open_one(place: Path, name: str, settings: Settings) -> OnnxSubject:
    return OnnxSubject(place, name, settings)


class OnnxSubject(OnnxDecoder):
    """See `slimexport.bench.settings.Subject`."""

    kind = kind

    def __init__(self, place: Path, name: str, settings: Settings):
        super().__init__(place, settings.provider, settings.resolved_threads, settings.provider_options)
        self.name = name
        self.precision = self.artifact.precision if self.artifact else "?"
        self.vocabulary = self.signature.vocab_size or 256
        import onnx_ir

        graph = onnx_ir.load(str(self.path)).graph
        self.streamed_bytes: int | None = None if has_experts(self.directory) else streamed_bytes(graph)
        self.shared_kv = self.shared_kv or shares_buffers(graph)


def has_experts(directory: Path) -> bool:
    """Whether a token reads but a part of the weights, as the config beside them says."""
    path = directory / "config.json"
    return path.is_file() and any("experts" in name and value for name, value in read_json(path).items())


def shares_buffers(graph: ir.Graph) -> bool:
    """Whether one operator that can have past and present in one place makes all of the cache, in a graph of anyone."""
    made = [value.producer() for value in graph.outputs if str(value.name).startswith("present")]
    return bool(made) and all(node is not None and node.op_type == "GroupQueryAttention" for node in made)


def _through_reshape(node: ir.Node) -> list[ir.Node]:
    return [use.node for use in node.outputs[0].uses()] if node.op_type == "Reshape" else [node]


def streamed_bytes(graph: ir.Graph) -> int:
    """Bytes of the weights that one token reads: all, but of tables that only rows are taken from."""
    total = 0
    for value in graph.initializers.values():
        readers = {reader.op_type for use in value.uses() for reader in _through_reshape(use.node)}
        rows_only = bool(readers) and readers <= {"Gather", "GatherBlockQuantized", "GroupQueryAttention"}
        if value.const_value is not None and not rows_only:
            total += value.const_value.nbytes
    return total
