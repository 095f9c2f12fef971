"""Joules, where the machine tells: the counters of the processor packages (RAPL) that Linux shows in sysfs.

They count everything on the package, so only the difference between models that were measured in turns on a machine
that did nothing else says anything. Reading them usually takes root (`chmod a+r` on energy_uj).
"""

from __future__ import annotations

from pathlib import Path

PLACES = "intel-rapl:*[0-9]"  # AMD's too; intel-rapl:0:0 and the like are parts of intel-rapl:0
_ROOT = Path("/sys/class/powercap")


class Meter:
    """`joules()` since the meter was made, all packages together; `there` is False where nothing can be read."""

    def __init__(self, root: Path = _ROOT):
        self._places = [place for place in sorted(root.glob(PLACES)) if place.name.count(":") == 1]
        self._total, self._last = 0.0, self._read()
        self.there = bool(self._last)

    def joules(self) -> float:
        """Call it more often than a counter takes to begin anew (minutes)."""
        now = self._read()
        for place, microjoules in now.items():
            passed = microjoules - self._last.get(place, microjoules)
            if passed < 0:  # it began anew
                passed += int((place / "max_energy_range_uj").read_text())
            self._total += passed * 1e-6
        self._last = now
        return self._total

    def _read(self) -> dict[Path, int]:
        found = {}
        for place in self._places:
            try:
                found[place] = int((place / "energy_uj").read_text())
            except (OSError, ValueError):  # not for this user
                continue
        return found
