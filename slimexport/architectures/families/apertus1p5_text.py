"""Apertus 1.5, the text model: as Apertus."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.apertus import APERTUS

registry.register("apertus1p5_text")(replace(APERTUS, model_type="apertus1p5_text"))
