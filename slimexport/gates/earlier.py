"""The report of an earlier run, and what of it can be compared with this one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.artifacts import TextSource, VerificationReport
from slimexport.errors import BadInputError
from slimexport.gates.decide import Earlier

if TYPE_CHECKING:
    from slimexport.reporting.schema import Report

_MACHINE = ("cpu", "cores", "cuda")


def read(path: Path) -> Report:
    """`path` is a report.json, its directory, or a run directory; BadInputError where it is no report of ours."""
    from slimexport.reporting.schema import JSON_NAME, load_report
    from slimexport.run_directory import REPORT

    run = Path(path) / REPORT
    return load_report(run if (run / JSON_NAME).is_file() else Path(path))


def read_of(path: Path, fingerprint: str) -> Report:
    """`read`, and BadInputError where that is of another model than the one with this fingerprint."""
    earlier = read(path)
    if earlier.source.fingerprint != fingerprint:
        raise BadInputError(
            f"{path} is the report of another model: {earlier.source.name} has the fingerprint "
            f"{earlier.source.fingerprint[:12]}, this one {fingerprint[:12]}."
        )
    return earlier


def comparisons(
    earlier: Report, names: tuple[str, ...], environment: Mapping[str, Any], text: TextSource, window: int
) -> dict[str, Earlier]:
    """What each export, the first one first, is compared with. Times need the same machine, accuracy the same text."""
    then = earlier.environment
    other = [f"{key} {then.get(key)!r}, now {environment.get(key)!r}" for key in _MACHINE
             if then.get(key) != environment.get(key)]  # fmt: skip
    no_times = f"the earlier run was on another machine ({other[0]})" if other else ""
    of = earlier.each
    made = {}
    for name in names:
        if name not in of:
            continue
        accuracy = of[name].accuracy
        same = accuracy.get("text_sha256") == text.sha256 and accuracy.get("window") == window
        same = same and earlier.evaluation is not None and earlier.evaluation.tokens == text.tokens
        no_text = "" if same else "the earlier run was evaluated on another text, more or less of it, or another window"
        made[name] = Earlier(of[name], no_times, no_text)
    return made


def of_export(name: str, found: Mapping[str, Earlier]) -> Earlier:
    """Of an export that the earlier run did not have, an empty report."""
    return found.get(name) or Earlier(VerificationReport(()))
