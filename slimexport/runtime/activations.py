"""What goes through a graph: second moments of values between its operators, on a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimexport.artifacts import remove
from slimexport.runtime.onnx import GRAPH, OnnxDecoder, open_session

TAPPED = ".tapped.onnx"
MEMORY = 2 * 2**30  # bytes of moments at a time; what is more takes another pass over the text


def second_moments(
    directory: Path,
    widths: Mapping[str, int],
    windows: NDArray[np.int64],
    *,
    provider: str = "cpu",
    threads: int | None = None,
) -> dict[str, NDArray[np.float64]]:
    """X^T X, float64 [K, K], of values in the graph of `directory`: name -> K in `widths`; X has a row for every token
    of all `windows` [n, t]. A value that has other rows than these (one of many experts) is left out.

    Raises BadInputError where ONNX Runtime cannot open the graph.
    """
    decoder = OnnxDecoder(directory, provider, threads)
    found: dict[str, NDArray[np.float64]] = {}
    for part in _parts(widths):
        for outputs in _run(decoder, part, windows):
            for name, value in zip(part, outputs, strict=True):
                if value.shape == (1, windows.shape[1], widths[name]):
                    rows = value[0].astype(np.float32, copy=False)
                    found[name] = found.get(name, 0.0) + (rows.T @ rows).astype(np.float64)
    return found


def _parts(widths: Mapping[str, int]) -> Iterator[list[str]]:
    """As many at a time as there is memory for."""
    part: list[str] = []
    held = 0
    for name, width in widths.items():
        if part and held + 8 * width**2 > MEMORY:
            yield part
            part, held = [], 0
        part.append(name)
        held += 8 * width**2
    if part:
        yield part


def _run(decoder: OnnxDecoder, names: Sequence[str], windows: NDArray[np.int64]) -> Iterator[list[NDArray[Any]]]:
    """The values `names` of each window, from a session that gives them out."""
    import onnx_ir

    model = onnx_ir.load(decoder.directory / GRAPH)
    values = {value.name: value for node in model.graph for value in node.outputs}
    for name in names:
        if not values[name].is_graph_output():
            model.graph.outputs.append(values[name])
    place = decoder.directory / TAPPED
    onnx_ir.save(model, place)  # the weights stay where they are
    try:
        session = open_session(place, decoder.provider, decoder.threads, {})
    finally:
        remove(place)
    for window in windows:
        yield session.run(list(names), decoder.feeds(window[None]))
