"""Keeps libraries from talking during an export: stdout is for results, stderr for what the user must know."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

_LIBRARIES = ("mobius", "onnxscript", "onnx_ir", "onnx_shape_inference", "torch.onnx", "torch.export", "transformers")


@contextmanager
def quiet() -> Iterator[None]:
    """Drops what libraries print to stdout, their warnings, and their log records below ERROR.

    What importing them does to the root logger is undone (onnxruntime.quantization makes it print everything).
    """
    root = logging.getLogger()
    handlers, level_of_root = list(root.handlers), root.level
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level_of_root)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
