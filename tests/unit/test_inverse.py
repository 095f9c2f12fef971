"""The inverse of a damped H against the exact one, in float64."""

from __future__ import annotations

import pytest
import torch
from test_obs import problem, wide

from slimexport.pruning import inverse as inverses
from slimexport.pruning.inverse import damped_inverse


def test_inverse_is_the_damped_inverse() -> None:
    _, H, inverse = problem(3, 12)
    torch.testing.assert_close(inverse @ H, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_it_is_made_in_blocks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, within: float) -> None:
    """Of a size that they do not divide."""
    monkeypatch.setattr(inverses, "ROWS", 40)
    if dtype == torch.float32:
        monkeypatch.setattr(inverses, "SINGLE_FROM", 64)
    H = wide(1e2)
    found = damped_inverse(H, 1e-2)
    assert found.inverse.dtype == dtype
    assert found.inverse.is_contiguous()
    exact = torch.linalg.inv(H + found.ridge * torch.eye(96, dtype=torch.float64))
    scale = exact.diagonal().sqrt()
    assert float(((found.inverse - exact) / scale / scale[:, None]).abs().max()) < within


def test_damping_grows_until_cholesky_succeeds() -> None:
    v = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    H = torch.outer(v, v)
    H[0, 0] -= 0.02 * float(H.diagonal().mean())  # slightly indefinite: 0.01 is not enough
    inverse, dead, used, ridge = damped_inverse(H, 1e-4)
    assert ridge == pytest.approx(used * float(H.diagonal().mean()))
    assert used > 1e-4
    assert torch.isfinite(inverse).all()
    assert not dead.any()


def test_hopeless_matrix_is_refused() -> None:
    with pytest.raises(inverses.NotPositiveDefiniteError, match="not positive definite"):
        damped_inverse(torch.tensor([[1.0, 1e9], [1e9, 1.0]]), 1e-8)


def test_a_few_large_inputs_are_no_reason_for_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    H = wide(1.0)
    large = torch.ones(96, dtype=torch.float64)
    large[[3, 40, 41, 90]] = 1e4
    monkeypatch.setattr(inverses, "SINGLE_FROM", 64)
    found = damped_inverse(H * large * large[:, None], 1e-9)
    assert found.inverse.dtype == torch.float32


def test_what_float32_cannot_is_done_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that are nearly one input: no scaling helps."""
    g = torch.Generator().manual_seed(10)
    one = torch.randn(1, 300, generator=g, dtype=torch.float64)
    X = one + 1e-3 * torch.randn(96, 300, generator=g, dtype=torch.float64)
    H = X @ X.T / 300
    monkeypatch.setattr(inverses, "SINGLE_FROM", 64)
    found = damped_inverse(H, 1e-9)
    assert found.inverse.dtype == torch.float64
    damped = H + found.ridge * torch.eye(96, dtype=torch.float64)
    torch.testing.assert_close(found.inverse @ damped, torch.eye(96, dtype=torch.float64), rtol=0, atol=1e-4)
