"""Sarvam 105B: DeepSeek V3 by another name."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.deepseek_v3 import FAMILY as DEEPSEEK_V3

registry.register("sarvam_mla")(replace(DEEPSEEK_V3, model_type="sarvam_mla"))
