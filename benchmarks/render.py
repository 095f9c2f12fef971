"""Puts the tables of the committed results where the README and docs/ have a place for them.

    python benchmarks/render.py            # rewrites what stands between the markers
    python benchmarks/render.py --check    # changes nothing; fails where a table is not that of the results

A place is `<!-- table: NAME -->` ... `<!-- /table -->`; the names are those of TABLES.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import cost
import families
import gate_noise
import latency
import operators
import quality
import recovery
import rounding
import scale
import size
import speed
import sweep_cost
import task_agreement
from common import RESULTS, load_rows

ROOT = Path(__file__).parent.parent
PAGES = ("pruning", "graphs", "speed", "gates", "families", "scale", "recovery")
DOCUMENTS = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in PAGES))
TABLES: dict[str, tuple[str | Path, Callable[..., str]]] = {
    "quality-summary": ("quality.json", quality.summary),
    "quality": ("quality.json", quality.render),
    "quality-compared": ("quality.json", quality.compared),
    "quality-calibration": ("quality.json", quality.calibrations),
    "recovery-summary": ("recovery.json", recovery.summary),
    "recovery": ("recovery.json", recovery.render),
    "recovery-controls": ("recovery.json", recovery.controls),
    "size": ("size.json", size.render),
    "cost": ("cost.json", cost.render),
    "families": (families.CHECKED, families.render),
    "latency-summary": ("latency.json", latency.summary),
    "latency": ("latency.json", latency.render),
    "speed": ("speed.json", speed.render),
    "operators": ("operators.json", operators.render),
    "scale": ("scale.json", scale.render),
    "floor": ("scale_floor.json", scale.render_floor),
    "rounding": ("rounding.json", rounding.render),
    "gate-noise": ("gate_noise.json", gate_noise.render),
    "task-agreement": ("task_agreement.json", task_agreement.render),
    "sweep": ("sweep.json", sweep_cost.render),
}
PLACE = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- /table -->", re.DOTALL)


def rendered(text: str) -> str:
    """`text` with every table made anew. Raises KeyError for a name that no table has."""

    def made(place: re.Match[str]) -> str:
        file, render = TABLES[place[1]]
        return f"<!-- table: {place[1]} -->\n{render(load_rows(RESULTS / file))}\n<!-- /table -->"

    return PLACE.sub(made, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        if (new := rendered(text)) != text:
            stale.append(document)
            if not options.check:
                document.write_text(new, encoding="utf-8")
    if options.check and stale:
        sys.exit(f"Not the tables of the committed results: {', '.join(map(str, stale))}; run benchmarks/render.py.")


if __name__ == "__main__":
    main()
