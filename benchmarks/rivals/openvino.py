"""OpenVINO's own runtime, as transformers exports for it: the cache is the runtime's state, logits of the last token.

Weights in few bits are NNCF's, made without data: int8 by output, int4 in groups of 32 inputs and in all products, as
ours are. Activations and cache are left to OpenVINO, which rounds the activations of quantised products to 8 bits.

pip install openvino nncf
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rivals import Unsupported

GRAPH = "openvino_model.xml"


def build(model: Any, precision: str, place: Path) -> None:
    """Writes the graph of `model` (transformers, float32)."""
    try:
        import nncf
        import openvino  # noqa: F401
    except ImportError as error:
        raise Unsupported(f"pip install openvino nncf ({error})") from error
    import torch
    from transformers import DynamicCache
    from transformers.exporters import NNCFOpenVINOQuantizer, NNCFWeightCompressionConfig, OpenVINOConfig
    from transformers.exporters.exporter_openvino import OpenVINOExporter

    from slimexport.artifacts import staged_directory

    modes = {
        "int8": {"mode": nncf.CompressWeightsMode.INT8_ASYM},
        "int4": {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": 32, "ratio": 1.0, "all_layers": True},
    }
    quantizer = NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig(**modes[precision])) if precision in modes else None
    batch, past, tokens = 2, 5, 3  # above 1, or they would be constants
    config, cache = model.config, DynamicCache()
    shape = (batch, config.num_key_value_heads, past, config.head_dim)
    for block in range(config.num_hidden_layers):
        cache.update(torch.zeros(shape), torch.zeros(shape), block)
    inputs = {
        "input_ids": torch.zeros(batch, tokens, dtype=torch.int64),
        "attention_mask": torch.ones(batch, past + tokens, dtype=torch.int64),
        "position_ids": torch.arange(past, past + tokens).expand(batch, tokens).clone(),
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    settings = OpenVINOConfig(dynamic=True, quantizer=quantizer, stateful=False)
    graph = OpenVINOExporter().export(model, inputs, config=settings).program
    _keep_cache(graph)
    with staged_directory(place) as partial:
        OpenVINOExporter.save_program(graph, partial / GRAPH)


def _keep_cache(graph: Any) -> None:
    """Makes the cache the runtime's state, of one sequence, with the `beam_idx` by which its CPU plugin knows attention
    over a state. (The exporter's `stateful` finds nothing here: in- and outputs have other names in transformers 5.24.)
    """
    import openvino.opset14 as ops
    from openvino import PartialShape
    from openvino._offline_transformations import apply_make_stateful_transformation

    shapes = {min(port.get_names()): port.get_partial_shape() for port in graph.inputs}
    for shape in shapes.values():
        if len(shape) > 1:
            shape[0] = 1
    graph.reshape(shapes)
    beam = ops.parameter(name="beam_idx", dtype=np.int32, shape=PartialShape([1]))
    beam.output(0).get_tensor().set_names({"beam_idx"})
    graph.add_parameters([beam])
    made = {min(port.get_names()).partition(".")[2]: min(port.get_names()) for port in graph.outputs}
    pairs = {name: made[name.partition(".")[2]] for name in shapes if name.startswith("past_key_values.")}
    for name in pairs:
        port = graph.input(name)
        readers = port.get_target_inputs()
        gathered = ops.gather(port, beam, ops.constant(np.int64(0)))
        for reader in readers:
            reader.replace_source_output(gathered.output(0))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, pairs)


def opened(place: Path, name: str, settings: Any, precision: str) -> OpenVinoSubject:
    """In float32 where the model is: by itself OpenVINO computes in bfloat16 where the CPU can."""
    return OpenVinoSubject(
        place, name, settings, precision, {"INFERENCE_PRECISION_HINT": "f32"} if precision == "fp32" else {}
    )


def opened_as_it_comes(place: Path, name: str, settings: Any, precision: str) -> OpenVinoSubject:
    return OpenVinoSubject(place, name, settings, precision, {})


class OpenVinoSubject:
    """See `slimexport.bench.settings.Subject`."""

    kind = "openvino"

    def __init__(self, place: Path, name: str, settings: Any, precision: str, hints: dict[str, str]):
        import openvino

        self.name, self.precision = name, precision
        properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": settings.resolved_threads, **hints}
        self.compiled = compiled = openvino.Core().compile_model(str(place / GRAPH), "CPU", properties)
        self.request = compiled.create_infer_request()
        self.names = {min(port.get_names()) for port in compiled.inputs}
        self.vocabulary = compiled.output("logits").get_partial_shape()[-1].get_length()
        self.max_positions: int | None = None
        self.streamed_bytes: int | None = None

    def stepped(self, prompt_ids: NDArray[np.int64], steps: int) -> Iterator[tuple[float, int]]:
        self.request.reset_state()
        ids, length = np.asarray(prompt_ids, np.int64)[None], 0
        for _ in range(steps + 1):
            started = time.perf_counter()
            given = {
                "input_ids": ids,
                "attention_mask": np.ones((1, length + ids.shape[1]), np.int64),
                "position_ids": np.arange(length, length + ids.shape[1])[None],
                "beam_idx": np.zeros(1, np.int32),
                "logits_to_keep": np.array(1),
            }
            feed = {key: value for key, value in given.items() if key in self.names}
            logits = self.request.infer(feed, share_inputs=True, share_outputs=True)["logits"]
            length += ids.shape[1]
            token = int(logits[0, -1].argmax())
            ids = np.array([[token]], np.int64)
            yield time.perf_counter() - started, token

    def timed_batch(self, prompts: NDArray[np.int64], steps: int) -> float | None:
        return None
