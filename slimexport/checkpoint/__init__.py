"""Checkpoints: a Hugging Face directory with really smaller tensors, written, loaded, and compared after a reload."""

from __future__ import annotations

from slimexport.checkpoint.load import load
from slimexport.checkpoint.save import save_checkpoint

__all__ = ["load", "save_checkpoint"]
