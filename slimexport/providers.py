"""ONNX Runtime's execution providers, by the names that slimexport gives them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Provider:
    """`theirs` is ONNX Runtime's name; the cache lives in the memory of `device`; `builder` is mobius' name for graphs
    made for it, `fusions` that of transformers' exporter. The README says which were run."""

    theirs: str
    device: str = "cpu"
    builder: str = "default"
    fusions: str = "cpu"
    package: str = "onnxruntime"


def parsed(options: Iterable[str]) -> dict[str, str]:
    """`KEY=VALUE` words as a dict. Raises ValueError for one that is not."""
    found = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise ValueError(f"provider_option must be KEY=VALUE, not {option!r}")
        found[key] = value
    return found


PROVIDERS = {
    "cpu": Provider("CPUExecutionProvider", builder="cpu", package="slimexport[cpu]"),
    "cuda": Provider("CUDAExecutionProvider", "cuda", "cuda", "cuda", "slimexport[gpu]"),
    "tensorrt": Provider("TensorrtExecutionProvider", "cuda", "onnx-standard", "cuda", "slimexport[gpu]"),
    "openvino": Provider("OpenVINOExecutionProvider", builder="openvino", package="onnxruntime-openvino"),
    "directml": Provider("DmlExecutionProvider", builder="dml", package="onnxruntime-directml"),
    "coreml": Provider("CoreMLExecutionProvider"),
}
SUPPORTED = ("cpu", "cuda")  # the others: the same interface, without tests
