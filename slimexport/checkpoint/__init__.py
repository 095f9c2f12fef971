"""Checkpoints: a Hugging Face directory with really smaller tensors, written, loaded, and compared after a reload."""

from __future__ import annotations

from slimexport.checkpoint.load import load, load_weights
from slimexport.checkpoint.save import check_round_trip, save_checkpoint, write_model

__all__ = ["check_round_trip", "load", "load_weights", "save_checkpoint", "write_model"]
