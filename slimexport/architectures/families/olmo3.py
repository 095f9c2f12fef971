"""OLMo 3: as OLMo 2, with sliding windows in most blocks."""

from dataclasses import replace

from slimexport.architectures import registry
from slimexport.architectures.families.olmo2 import OLMO2

registry.register("olmo3")(replace(OLMO2, model_type="olmo3"))
