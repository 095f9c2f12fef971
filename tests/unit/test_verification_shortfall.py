"""What a missed ideal is put down to: times are made up of a part that shrinks and one that does not."""

from __future__ import annotations

import pytest

from slimexport.artifacts import Figure
from slimexport.verification.shortfall import shortfall


def figure(fixed: float, slower: float = 1.0, **changes: object) -> Figure:
    """20 ms of work that shrinks to 75 %, which is then `slower`, and `fixed` ms that stay."""
    dense, own = 20 + fixed, 15 * slower + fixed
    made = {"shrunk": own, "baseline": dense, "ratio": own / dense, "ideal": 0.75, **changes}
    return Figure("decode.tpot_ms", "ms", **made)  # type: ignore[arg-type]


def test_the_part_that_does_not_shrink_is_found() -> None:
    said = shortfall(figure(5.0), 300)
    assert said is not None
    assert said.startswith("decode.tpot_ms has 94% of its ideal speed-up, as if about 5 of 20 ms")
    assert "did not shrink with the bytes (attention over the cache, norms, the calls of 300 operators)" in said
    assert "operators" not in (shortfall(figure(5.0), 0) or "")


def test_prefill_counts_flops() -> None:
    made = Figure("prefill.ttft_ms.128", "ms", shrunk=20.0, baseline=25.0, ratio=0.8, ideal=0.75)
    assert "did not shrink with the FLOPs (attention, norms)" in (shortfall(made, 0) or "")


def test_slower_kernels_are_no_fixed_part() -> None:
    assert "is no faster: its bytes are worked off more slowly" in (shortfall(figure(0.0, slower=1.4), 300) or "")


@pytest.mark.parametrize(
    "made",
    [
        figure(0.5),  # 98 % of the ideal
        figure(5.0, valid=False),
        figure(5.0, ideal=None),
        figure(5.0, ideal=1.0),
        figure(5.0, baseline=None, ratio=None),
        figure(5.0, better="higher"),
    ],
    ids=["enough", "invalid", "no ideal", "nothing was removed", "no baseline", "a rate"],
)
def test_what_needs_no_reason(made: Figure) -> None:
    assert shortfall(made, 300) is None
