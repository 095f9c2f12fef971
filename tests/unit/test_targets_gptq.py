"""Rounding that repairs itself, against the least squares that it stands for, solved column by column in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import torch
from onnx_fixture import VOCAB, export_tiny, tiny_llama

from slimexport.runtime.activations import second_moments
from slimexport.targets.quantise import SCHEMES, check_quantised, gptq, inputs_to_measure, quantise
from slimexport.targets.quantise.levels import Levels, nearest, packed, unpacked

RNG = np.random.default_rng(0)


def problem(outputs: int, inputs: int, rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and H of inputs that go together, a few of them much larger than the rest."""
    mixing = RNG.normal(size=(inputs, inputs)) * np.exp(RNG.normal(size=inputs))
    X = RNG.normal(size=(rows, inputs)) @ mixing
    return RNG.normal(size=(outputs, inputs)).astype(np.float32), X.T @ X


@pytest.mark.parametrize("inputs", [64, 80], ids=["whole blocks", "half a block"])
def test_every_weight_was_the_best_answer_to_what_was_lost_before(inputs: int) -> None:
    W, H = problem(6, inputs)
    levels, target = gptq.repaired(W, H, 4)
    Q = levels.numbers()[:, :inputs]
    damped = H + gptq.DAMPING * H.diagonal().mean() * np.eye(inputs)
    for column in range(inputs):
        # min over the weights from here on of (w - W) H (w - W)^T, those before being what they are
        lost = Q[:, :column] - W[:, :column]
        best = W[:, column:] - lost @ damped[:column, column:] @ np.linalg.inv(damped[column:, column:])
        assert np.abs(best[:, 0] - target[:, column]).max() < 1e-4 * np.abs(W).max()


def test_it_loses_less_where_it_counts() -> None:
    W, H = problem(48, 96)
    levels, target = gptq.repaired(W, H, 4)
    assert target is not W
    assert gptq.output_error(W, levels, H) < 0.7 * gptq.output_error(W, nearest(W, 4), H)
    direct = np.trace((levels.numbers() - W) @ H @ (levels.numbers() - W).T)
    assert gptq.output_error(W, levels, H) == pytest.approx(direct, rel=1e-9)


def test_it_is_never_worse_than_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = problem(6, 64)
    bad = Levels(nearest(W, 4).codes, np.zeros((6, 2), np.float32), nearest(W, 4).zero_points)
    monkeypatch.setattr(gptq, "_by_columns", lambda *_: (bad, W))
    levels, target = gptq.repaired(W, H, 4)
    assert target is W
    assert np.array_equal(levels.numbers(), nearest(W, 4).numbers())


def test_inputs_that_are_never_seen_and_few_rows() -> None:
    """H has no inverse: half of its rows are nothing, and the other half were made of three."""
    W, _ = problem(6, 64)
    X = np.zeros((3, 64))
    X[:, :32] = RNG.normal(size=(3, 32))
    levels, _ = gptq.repaired(W, X.T @ X, 4)
    assert np.isfinite(levels.numbers()).all()
    assert gptq.output_error(W, levels, X.T @ X) <= gptq.output_error(W, nearest(W, 4), X.T @ X)


def test_it_is_stored_like_the_nearest() -> None:
    """ONNX Runtime's own arrays decide the shapes: the embedding's operator minds them."""
    for inputs in (64, 96):  # of 96 the last byte of zero points is half empty
        W, H = problem(6, inputs)
        made, plain = gptq.repaired(W, H, 4)[0], nearest(W, 4)
        for part in ("codes", "scales", "zero_points"):
            assert getattr(made, part).shape == getattr(plain, part).shape, part
            assert getattr(made, part).dtype == getattr(plain, part).dtype, part


def test_packing() -> None:
    numbers = RNG.integers(0, 16, (3, 7)).astype(np.uint8)
    assert np.array_equal(unpacked(packed(numbers, 4), 4)[:, :7], numbers)
    assert np.array_equal(packed(numbers, 8), numbers)
    assert packed(numbers, 4)[0, 0] == numbers[0, 0] + 16 * numbers[0, 1]


# ------------------------------------------------------------------------------------------------------- in a graph


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    return np.asarray(RNG.integers(0, VOCAB, (16, 40)))


def test_moments_are_those_that_torch_sees(
    tmp_path: Path, windows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    export_tiny(model, tmp_path / "onnx")
    graph = onnx_ir.load(tmp_path / "onnx" / "model.onnx")
    widths = inputs_to_measure(graph)
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def add(_, given) -> None:
            rows = given[0].reshape(-1, given[0].shape[-1]).double()
            seen[name] = seen.get(name, 0) + rows.T @ rows

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.inference_mode():
        for window in windows:
            model(torch.from_numpy(window)[None])
    found = second_moments(tmp_path / "onnx", widths, windows, threads=1)
    assert len(found) == len(widths) == 4 * 3 + 1
    for name, moments in found.items():  # q, k, v read the same, and so do gate and up
        nearest_one = min(float((torch.from_numpy(moments) - other).abs().max() / other.abs().max())
                          for other in seen.values() if other.shape == moments.shape)  # fmt: skip
        assert nearest_one < 1e-4, name
    assert [path.name for path in (tmp_path / "onnx").iterdir() if path.name.startswith(".")] == []
    monkeypatch.setattr("slimexport.runtime.activations.MEMORY", 8 * 48**2)
    apart = second_moments(tmp_path / "onnx", widths, windows, threads=1)
    assert all(np.allclose(apart[name], found[name], rtol=1e-5) for name in widths)


def test_a_graph_rounded_by_its_inputs(tmp_path: Path, windows: np.ndarray) -> None:
    """Closer to the float graph than the one with nearest levels; and each level is still checked."""
    from slimexport.runtime import OnnxDecoder

    model = tiny_llama(channels=128)
    export_tiny(model, tmp_path / "onnx")
    float_graph = onnx_ir.load(tmp_path / "onnx" / "model.onnx")
    moments = second_moments(tmp_path / "onnx", inputs_to_measure(float_graph), windows, threads=1)
    other = np.random.default_rng(1).integers(0, VOCAB, (4, 40))
    expected = OnnxDecoder(tmp_path / "onnx", threads=1).forward(other)[0]
    errors = []
    for name, given in (("nearest", None), ("repaired", moments)):
        made = onnx_ir.load(tmp_path / "onnx" / "model.onnx")
        sources = quantise(made, SCHEMES["int4"], given)
        export_tiny(model, tmp_path / name)
        onnx_ir.save(made, str(tmp_path / name / "model.onnx"), external_data="model.onnx.data")
        check_quantised(tmp_path / name / "model.onnx", sources)
        assert any(source.cut for source in sources.values()) == (given is not None)
        errors.append(float(np.square(OnnxDecoder(tmp_path / name, threads=1).forward(other)[0] - expected).mean()))
    assert errors[1] < 0.9 * errors[0], "on other text"
