"""What the documents say is what was measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def test_tables_are_those_of_the_committed_results() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "render.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_place_is_found_and_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import render

    text = "before\n<!-- table: cost -->\nold\n<!-- /table -->\nafter\n"
    new = render.rendered(text)
    assert new.startswith("before\n<!-- table: cost -->\n| model |")
    assert new.endswith("|\n<!-- /table -->\nafter\n")
    assert "old" not in new
    assert render.rendered(new) == new
    with pytest.raises(KeyError):
        render.rendered("<!-- table: nothing -->\n<!-- /table -->")
    for document in render.DOCUMENTS:
        assert render.PLACE.search(document.read_text(encoding="utf-8"))


def test_ratios_of_the_latency_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paired by round, over processes that differ; who is faster is named."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import latency

    def row(process: int, slow: float) -> dict[str, object]:
        times = {"slimexport": 1.0, "genai builder": 1.25, "openvino": 0.5}
        noise = np.random.default_rng(process).uniform(0.9, 1.1, 3)
        seconds = {
            name: {quantity: (0.01 * slow * time * noise).tolist() for quantity in latency.QUANTITIES}
            for name, time in times.items()
        }
        return {"group": "dense/int8/1", "process": process, "seconds": seconds}

    rows = [row(0, 1.0), row(1, 2.0), row(2, 1.5)]
    cell = latency.cells(rows, "dense/int8/1")["genai builder"]["decode.tpot_ms.128"]
    assert (cell.ratio, cell.low, cell.high) == pytest.approx((1.25, 1.25, 1.25))
    assert 10 < cell.ms < 28
    line = latency.summary(rows).splitlines()[-1]
    assert line.count("(1.25)") == 4
    assert "openvino 2.00 x (TTFT 128)" in line
    assert "genai builder 0" not in line
    assert "| dense, int8, 1 | openvino |" in latency.render(rows)


def test_the_cost_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sweep_cost

    values = {"size.export_mb": 100.0, "accuracy.perplexity": 20.0}
    point = {"name": "0.1 onnx", "ratio": 0.1, "export": "onnx", "values": values, "ratios": {"size.export_mb": 0.9}}
    rows = [
        {"kind": "sweep", "options": "--x", "cpu_seconds": 300.0, "wall_seconds": 200.0, "points": [point],
         "fronts": {"size.export_mb": ["0.1 onnx"]}},
        *({"kind": f"run {ratio}", "cpu_seconds": 200.0, "wall_seconds": 125.0} for ratio in (0.1, 0.2)),
    ]  # fmt: skip
    assert ": 0.75 (0.80 of the wall clock)" in sweep_cost.cost(rows)
    assert "| 0.1 | onnx | 100 | 0.90 | 20.00 | – | – | yes |" in sweep_cost.render(rows)
