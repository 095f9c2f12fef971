"""The energy counters of a machine, as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimexport.machine.energy import Meter


def counters(root: Path, **microjoules: int) -> None:
    for name, value in microjoules.items():
        place = root / f"intel-rapl:{name[1:].replace('_', ':')}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "energy_uj").write_text(f"{value}\n")
        (place / "max_energy_range_uj").write_text("1000000000\n")


def test_packages_are_added_up_and_their_parts_are_not(tmp_path: Path) -> None:
    counters(tmp_path, p0=5_000_000, p1=999_000_000, p0_0=1)
    meter = Meter(tmp_path)
    assert meter.there
    counters(tmp_path, p0=7_500_000, p1=999_500_000, p0_0=9_000_000)
    assert meter.joules() == pytest.approx(3.0)
    counters(tmp_path, p0=7_500_000, p1=500_000)  # began anew
    assert meter.joules() == pytest.approx(4.0)


def test_a_machine_without_counters(tmp_path: Path) -> None:
    meter = Meter(tmp_path)
    assert not meter.there
    assert meter.joules() == 0.0
    (tmp_path / "intel-rapl:0").mkdir()
    assert not Meter(tmp_path).there
