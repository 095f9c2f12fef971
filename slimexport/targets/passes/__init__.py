"""Rewriting a finished graph: each pass has a name, a switch (`--without-pass NAME`) and one file.

A pass changes the graph in place and says nothing, or leaves it alone and says why. Whatever comes out goes through the
same check of its logits as a graph that no pass has touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from slimexport.errors import BadInputError, nearest
from slimexport.targets.passes import gate_up, last_logits, unread

if TYPE_CHECKING:
    import onnx_ir as ir

Pass = Callable[["ir.Model"], str | None]
"""Changes the model in place and returns None, or leaves it as it was and returns the reason, in words for the user."""

PASSES: dict[str, Pass] = {"gate_up": gate_up.fuse, "last_logits": last_logits.select, "unread": unread.drop}
"""In the order in which they are applied."""


def apply(model: ir.Model, without: tuple[str, ...] = ()) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Applies all passes but `without`; returns the names of those that changed the graph, and notes on the others.

    Raises BadInputError for a name in `without` that no pass has.
    """
    done, notes = [], []
    for name in without:
        if name not in PASSES:
            raise BadInputError(f"There is no pass {name!r} over the graph.{nearest(name, PASSES)}")
    for name, rewrite in PASSES.items():
        if name in without:
            continue
        if why := rewrite(model):
            notes.append(f"Pass {name}: {why}.")
        else:
            done.append(name)
    return tuple(done), tuple(notes)
