"""Weight-only quantisation of a graph: products become MatMulNBits, the embedding's rows GatherBlockQuantized.

Every `BLOCK` inputs of an output have 2^bits levels, of which each weight takes the nearest; or, where the inputs of
products are known from a text, one by which the others can repair what is lost (gptq.py). Activations stay in the
graph's own precision; the kernels take them in 8 bits (`accuracy_level` 4), without which 8-bit weights decode many
times slower. A tied embedding is stored once, for both uses.
"""

from slimexport.targets.quantise.check import check_quantised
from slimexport.targets.quantise.graph import (
    SCHEMES,
    Scheme,
    inputs_to_measure,
    left_float,
    put_levels,
    quantise,
    without_rounded_activations,
)
from slimexport.targets.quantise.levels import BLOCK

__all__ = [
    "BLOCK",
    "SCHEMES",
    "Scheme",
    "check_quantised",
    "inputs_to_measure",
    "left_float",
    "put_levels",
    "quantise",
    "without_rounded_activations",
]
