"""slimexport: make a language model smaller with SlimGPT and ship it to ONNX Runtime, verified.

The Python API is the command line's: `slimexport.run(config, output)` and one function a stage (`plan`, `prune`,
`recover`, `export`, `verify`, `report`), `slimexport.load(directory)` for a shrunk checkpoint, and the values they take
and give.
Everything is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimexport.checkpoint.load import load as load
    from slimexport.config import RunConfig as RunConfig
    from slimexport.gates.declared import Gate as Gate
    from slimexport.pipeline import export as export
    from slimexport.pipeline import plan as plan
    from slimexport.pipeline import prune as prune
    from slimexport.pipeline import recover as recover
    from slimexport.pipeline import report as report
    from slimexport.pipeline import run as run
    from slimexport.pipeline import verify as verify
    from slimexport.progress import Progress as Progress
    from slimexport.reporting import Report as Report

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("run", "plan", "prune", "recover", "export", "verify", "report"), "slimexport.pipeline"),
    **dict.fromkeys(("RunConfig", "Gate"), "slimexport.config"),
    "load": "slimexport.checkpoint",
    "Progress": "slimexport.progress",
    "Report": "slimexport.reporting",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'slimexport' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
