"""The `gguf` target: one file for llama.cpp."""

from slimexport.targets.gguf import target as target
