"""The benchmark's own sums, where they are not the product's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimexport.verification.perplexity import _compare

ROOT = Path(__file__).parents[2]


def test_sums_on_a_device_are_those_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import accuracy

    generator = torch.Generator().manual_seed(1)
    logits, dense = (5 * torch.randn(40, 300, generator=generator) for _ in range(2))
    dense[:20] = logits[:20] + 0.01 * dense[:20]
    targets = torch.randint(300, (40,), generator=generator).numpy()
    ours = accuracy.beside_on_device(logits, dense, targets)
    theirs = _compare(logits.numpy(), dense.numpy(), targets)
    assert ours[:3] == pytest.approx(theirs[:3], rel=1e-5)
    assert ours[3] == theirs[3]
