"""AdamW, and what it keeps of a parameter, which is saved and taken back as tensors.

"adamw" is torch's, moments in float32; "adamw-8bit" is bitsandbytes', moments in 8 bits by blocks of 256 (Dettmers et
al., arXiv 2110.02861): of a parameter 2 bytes instead of 8, those of small ones stay as they are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from slimexport.errors import BadInputError

Optimiser = torch.optim.Optimizer
BETAS = (0.9, 0.98)  # few steps: the second moment has to forget the beginning
MOMENT_BYTES = {"adamw": 8.0, "adamw-8bit": 2 * (1 + 4 / 256)}  # of a parameter; a block has its scale in float32
INSTALL = "pip install 'slimexport[8bit]'"
_LEVELS = {"qmap1": "dynamic", "qmap2": "udynamic"}  # of bitsandbytes: what the 256 numbers stand for, always the same


def check(name: str) -> None:
    """Raises BadInputError where a package that `name` needs is not here."""
    if name == "adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise BadInputError(f"--recover-optimizer {name} needs bitsandbytes, which is not installed: {INSTALL}.")


def optimiser(name: str, parameters: Iterable[nn.Parameter], learning_rate: float) -> Optimiser:
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, betas=BETAS, weight_decay=0.0, fused=True)
    from bitsandbytes.optim import AdamW8bit

    made: Optimiser = AdamW8bit(parameters, lr=learning_rate, betas=BETAS, weight_decay=0.0)
    return made


def moments(of: Optimiser, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """KEY.NAME -> what it keeps of the parameter of that name; empty before the first step."""
    return {
        f"{key}.{name}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in of.state.get(parameter, {}).items()
        if key not in _LEVELS
    }


def take_moments(of: Optimiser, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, torch.Tensor]) -> None:
    """Goes on with what `moments` gave, in place of its own."""
    of.state.clear()
    found: dict[str, dict[str, Any]] = {}
    for at, value in saved.items():
        key, _, name = at.partition(".")
        found.setdefault(name, {})[key] = value.to(parameters[name].device)
    eight_bit: Any = of if hasattr(of, "name2qmap") else None
    if found and eight_bit:
        eight_bit.fill_qmap()
    for name, state in found.items():
        parameter = parameters[name]
        if eight_bit:
            state["step"] = int(state["step"])
            if state["state1"].dtype == torch.uint8:
                state |= {key: eight_bit.name2qmap[which].to(parameter.device) for key, which in _LEVELS.items()}
        of.state[parameter] = state
