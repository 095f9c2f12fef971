"""slimexport: make a language model smaller with SlimGPT and ship it to ONNX Runtime, verified."""

__version__ = "0.1.0"
