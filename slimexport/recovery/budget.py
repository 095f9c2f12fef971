"""How long recovery trains: a time, a number of tokens, or of steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s)?")
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([km]?)(tokens|steps)")
_FORM = "20m, 1h30m, 90s, 500k tokens or 200 steps"


@dataclass(frozen=True)
class Budget:
    """`amount` is above zero; tokens and steps are whole numbers."""

    amount: float
    unit: Literal["seconds", "tokens", "steps"]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Raises ValueError, one line, for what is no budget."""
        plain = "".join(text.lower().split())
        amount, unit = 0.0, "seconds"
        if (found := _COUNT.fullmatch(plain)) is not None:
            amount = float(int(float(found[1]) * {"": 1, "k": 10**3, "m": 10**6}[found[2]]))
            unit = found[3]
        elif plain and (found := _TIME.fullmatch(plain)) is not None:
            amount = sum(float(part or 0) * size for part, size in zip(found.groups(), (3600, 60, 1), strict=True))
        if not amount:
            raise ValueError(f"{text!r} is no budget: {_FORM} is needed")
        return cls(amount, unit)  # type: ignore[arg-type]

    def steps(self, tokens_per_step: int) -> int | None:
        """How many steps it holds; None where only their time will tell. 0: it is shorter than one."""
        if self.unit == "seconds":
            return None
        return int(self.amount) if self.unit == "steps" else int(self.amount) // tokens_per_step

    def __str__(self) -> str:
        from slimexport.progress import seconds

        return seconds(self.amount) if self.unit == "seconds" else f"{self.amount:,.0f} {self.unit}"
