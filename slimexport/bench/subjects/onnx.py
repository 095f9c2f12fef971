"""Exported graphs, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slimexport.run_directory import BASELINE, RUN
from slimexport.runtime import GRAPH, OnnxDecoder

if TYPE_CHECKING:
    import onnx_ir as ir

    from slimexport.bench.settings import Settings

kind = "onnx"


def find(path: Path) -> list[Path]:
    """The exported directory; of a run directory every one, and the baselines."""
    if path.is_file():
        return [path.parent] if path.name == GRAPH else []
    if (path / GRAPH).is_file():
        return [path]
    if not (path / RUN).is_file():
        return []
    return [graph.parent for where in (path, path / BASELINE) for graph in sorted(where.glob(f"*/{GRAPH}"))]


def open_one(place: Path, name: str, settings: Settings) -> OnnxSubject:
    return OnnxSubject(place, name, settings)


class OnnxSubject(OnnxDecoder):
    """See `slimexport.bench.settings.Subject`."""

    kind = kind

    def __init__(self, place: Path, name: str, settings: Settings):
        super().__init__(place, settings.provider, settings.resolved_threads)
        self.name = name
        self.precision = self.artifact.precision if self.artifact else "?"
        self.vocabulary = self.signature.vocab_size or 256
        import onnx_ir

        graph = onnx_ir.load(str(self.path)).graph
        self.streamed_bytes: int | None = streamed_bytes(graph)
        self.shared_kv = self.shared_kv or shares_buffers(graph)


def shares_buffers(graph: ir.Graph) -> bool:
    """Whether one operator that can have past and present in one place makes all of the cache, in a graph of anyone."""
    made = [value.producer() for value in graph.outputs if str(value.name).startswith("present")]
    return bool(made) and all(node is not None and node.op_type == "GroupQueryAttention" for node in made)


def streamed_bytes(graph: ir.Graph) -> int:
    """Bytes of the weights that one token reads: all, but of tables that only rows are taken from."""
    total = 0
    for value in graph.initializers.values():
        readers = {use.node.op_type for use in value.uses()}
        rows_only = bool(readers) and readers <= {"Gather", "GatherBlockQuantized", "GroupQueryAttention"}
        if value.const_value is not None and not rows_only:
            total += value.const_value.nbytes
    return total
