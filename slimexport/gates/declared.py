"""What a gate is, and how it is written: on one line, or as conditions on a figure in a recipe."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from slimexport.errors import nearest

Operator = Literal["<=", ">="]
GateOf = Literal["shrunk", "baseline", "ratio", "speedup", "earlier"]
RELATIVE: tuple[GateOf, ...] = ("ratio", "speedup", "earlier")

_GATE = re.compile(r"(?:(?P<of>\w+)\((?P<inner>[^()]+)\)|(?P<figure>[^()<>=]+))\s*(?P<op><=|>=)\s*(?P<bound>.+)")
_NUMBER = r"\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?"
_BOUND = re.compile(
    rf"(?P<number>[-+]?(?:{_NUMBER}))\s*(?P<unit>%|[A-Za-z][\w/]*)?\s*(?:(?P<sign>[-+])\s*(?P<tolerance>{_NUMBER})\s*%)?"
)
# Keys of a recipe's conditions -> of, operator.
_CONDITIONS: dict[str, tuple[GateOf, Operator]] = {
    "max": ("shrunk", "<="),
    "min": ("shrunk", ">="),
    "max_ratio_to_baseline": ("ratio", "<="),
    "min_ratio_to_baseline": ("ratio", ">="),
    "min_speedup": ("speedup", ">="),
    "max_ratio_to_earlier": ("earlier", "<="),
    "min_ratio_to_earlier": ("earlier", ">="),
}


# Settings that are a gate in short -> figure, of, operator; the setting's value is the bound.
SHORT: dict[str, tuple[str, GateOf, Operator]] = {
    "max_perplexity_ratio": ("accuracy.perplexity", "ratio", "<="),
    "max_kl": ("accuracy.kl", "shrunk", "<="),
    "min_speedup": ("decode.tpot_ms", "speedup", ">="),
    "max_latency_ms": ("decode.tpot_ms", "shrunk", "<="),
    "max_size_mb": ("size.export_mb", "shrunk", "<="),
}


class Gate(BaseModel):
    """A figure of the report, an operator and a bound: `accuracy.perplexity` of `ratio` `<=` 1.5.

    `of` is the shrunk model's value, the baseline's, or a relation: `ratio` is shrunk / baseline, `speedup` its
    inverse where lower is better, `earlier` shrunk / shrunk of an earlier run (`--against`). `tolerance` is the share
    of the bound by which it may be missed. On one line it is `accuracy.kl<=0.2`, `ratio(accuracy.perplexity)<=1.5`,
    `decode.tpot_ms<=20ms +5%`; flags and recipes take that form, and `str(gate)` gives it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    figure: str
    of: GateOf = "shrunk"
    op: Operator = "<="
    bound: float
    unit: str = ""
    tolerance: float = Field(default=0.0, ge=0)

    @property
    def about(self) -> tuple[str, GateOf, Operator]:
        """All but the bound."""
        return self.figure, self.of, self.op

    @property
    def limit(self) -> float:
        """What the value is compared with, as a plain number."""
        bound = self.bound / 100 if self.unit == "%" else self.bound
        slack = self.tolerance * abs(bound)
        return bound + slack if self.op == "<=" else bound - slack

    @classmethod
    def parse(cls, spec: str) -> Gate:
        """Reads the one-line form; raises ValueError that says what is wrong with it."""
        match = _GATE.fullmatch(spec.strip())
        if match is None:
            raise ValueError(f"{spec!r} is not a gate: write FIGURE<=BOUND, FIGURE>=BOUND or ratio(FIGURE)<=BOUND")
        of = match["of"] or "shrunk"
        known = typing.get_args(GateOf)
        if of not in known:
            raise ValueError(f"{spec!r}: {of!r} is none of {', '.join(known)}.{nearest(of, known)}")
        bound = _BOUND.fullmatch(match["bound"].strip())
        if bound is None:
            raise ValueError(f"{spec!r}: the bound {match['bound']!r} is not a finite number, with or without a unit")
        wanted = "+" if match["op"] == "<=" else "-"
        if bound["sign"] not in (None, wanted):
            raise ValueError(f"{spec!r}: a tolerance widens the bound: {wanted}{bound['tolerance']}%")
        return cls(
            figure=(match["inner"] or match["figure"]).strip(),
            of=of,  # type: ignore[arg-type]
            op=match["op"],  # type: ignore[arg-type]
            bound=float(bound["number"]),
            unit=bound["unit"] or "",
            tolerance=float(bound["tolerance"] or 0) / 100,
        )

    def __str__(self) -> str:
        figure = self.figure if self.of == "shrunk" else f"{self.of}({self.figure})"
        slack = f" {'+' if self.op == '<=' else '-'}{_plain(round(100 * self.tolerance, 9))}%" if self.tolerance else ""
        return f"{figure}{self.op}{_plain(self.bound)}{self.unit}{slack}"


def _plain(value: float) -> str:
    """As short as can be read back to the same number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value).removesuffix(".0")


def gates_of(value: Any) -> Any:
    """Gates from whatever a recipe or a flag may hold: one or several lines, fields, or conditions by figure
    (`decode.tpot_ms: {max_ratio_to_baseline: 0.8, tolerance: 0.02}`).

    Raises ValueError, one line. What is no gate at all comes back as it is, for pydantic to complain about.
    """
    if isinstance(value, str):
        return (Gate.parse(value),)
    if isinstance(value, Mapping):
        if "figure" in value:
            return (value,)
        return tuple(gate for figure, conditions in value.items() for gate in _conditions(str(figure), conditions))
    if isinstance(value, list | tuple):
        return tuple(gate for item in value for gate in (gates_of(item) if _holds_gates(item) else (item,)))
    return value


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `below`, and those of `above` in their place; gates are added. What `above` has a gate on, of the
    same model or relation and with the same operator, has none of `below` any more, whichever way they are written."""
    merged = {**below, **above}
    if not above.get("gates") and not SHORT.keys() & above.keys():
        return merged
    try:
        first, then = ([Gate.model_validate(gate) for gate in gates_of(of.get("gates") or ())] for of in (below, above))
    except (TypeError, ValueError):  # what is wrong with them is found, and said, where the settings are checked
        return merged
    named = {gate.about for gate in then} | {about for name, about in SHORT.items() if above.get(name) is not None}
    kept = [gate for gate in first if gate.about not in named]
    if "gates" in merged:
        merged["gates"] = [*kept, *then]
    return merged | {name: None for name in below.keys() & SHORT.keys() - above.keys() if SHORT[name] in named}


def _holds_gates(item: Any) -> bool:
    return isinstance(item, str | Mapping)


def _conditions(figure: str, conditions: Any) -> tuple[Gate, ...]:
    known = (*_CONDITIONS, "tolerance", "unit")
    if not isinstance(conditions, Mapping):
        raise ValueError(f"{figure}: write conditions, such as {{max_ratio_to_baseline: 0.8}}, not {conditions!r}")
    for key, value in conditions.items():
        if key not in known:
            raise ValueError(f"{figure}: unknown condition {key!r}.{nearest(str(key), known)}")
        if key != "unit" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{figure}: {key} must be a number, not {value!r}")
    bounds = {key: value for key, value in conditions.items() if key in _CONDITIONS}
    if not bounds:
        raise ValueError(f"{figure}: no condition is given; known are {', '.join(_CONDITIONS)}")
    unit, tolerance = str(conditions.get("unit", "")), conditions.get("tolerance", 0.0)
    relative = {key for key in bounds if _CONDITIONS[key][0] in RELATIVE}
    if unit == "%" and 0 < len(relative) < len(bounds):
        raise ValueError(
            f"{figure}: of {' and '.join(bounds)} it is not clear which is in %: write a line for each gate"
        )
    return tuple(
        Gate(
            figure=figure, of=_CONDITIONS[key][0], op=_CONDITIONS[key][1], bound=bound, tolerance=tolerance,
            unit="" if key in relative and unit != "%" else unit,
        )
        for key, bound in bounds.items()
    )  # fmt: skip
