"""Sarvam with experts: GLM 4.5's blocks."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.glm4_moe import FAMILY as GLM4_MOE

registry.register("sarvam_moe")(replace(GLM4_MOE, model_type="sarvam_moe"))
