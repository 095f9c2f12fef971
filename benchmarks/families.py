"""Every family through the conformance suite (slimexport.testing): the table of `slimexport architectures`.

    python benchmarks/families.py [--only llama,gpt2]

Tiny random models, minutes in all: graphs that are traced take half a minute each.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from common import load_rows, save_rows, table

from slimexport.architectures import registry
from slimexport.architectures.overview import CHECKED, HEAD, cells, overview
from slimexport.targets.builders import mobius
from slimexport.testing import CHECKS, kinds, tiny_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="families, joined by commas")
    options = parser.parse_args()
    rows = load_rows(CHECKED)
    for model, (family, changes) in kinds().items():
        if options.only and family not in options.only.split(","):
            continue
        started, checks = time.monotonic(), {}
        config = tiny_config(family, **changes)
        never = registry.get(family).no_trace and not mobius.knows(config)  # it is said to have no graph
        for name, check in CHECKS.items():
            if name == "exported" and never:
                continue
            with tempfile.TemporaryDirectory() as place:
                try:
                    check(config, Path(place))
                    checks[name] = True
                except Exception as error:
                    print(f"{model}, {name}: {type(error).__name__}: {error}")
                    checks[name] = False
        print(f"{model}: {sum(checks.values())} of {len(checks)}, {time.monotonic() - started:.0f} s", flush=True)
        rows = [row for row in rows if row["model"] != model]
        rows.append({"model": model, "family": family, "checks": checks})
        save_rows(CHECKED, sorted(rows, key=lambda row: row["model"]))


def render(_: list[dict[str, Any]]) -> str:
    return table(HEAD, [cells(row) for row in overview()[0]])


if __name__ == "__main__":
    main()
