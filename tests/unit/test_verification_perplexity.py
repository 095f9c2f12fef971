"""Perplexity, KL and agreement against brute force in float64, and their confidence interval against simulation."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
from onnx_fixture import VOCAB, export_tiny, tiny_llama

from slimexport.errors import BadInputError
from slimexport.runtime import OnnxDecoder
from slimexport.verification.perplexity import Accuracy, accuracy, torch_perplexity

WINDOW = 32
IDS = np.random.default_rng(1).integers(0, VOCAB, 3 * WINDOW + 7)


@dataclass
class FakeDecoder:
    """Logits that depend on token and position only: a table [window, vocab, vocab]."""

    table: np.ndarray

    def forward(self, ids):
        return self.table[np.arange(ids.shape[1]), ids[0]][None], None


def fake(seed, vocabulary=VOCAB, scale=3.0, offset=0.0):
    table = np.random.default_rng(seed).normal(size=(WINDOW, vocabulary, vocabulary)) * scale + offset
    return FakeDecoder(table.astype(np.float32))


def brute_force(decoder, dense, ids, window):
    """Everything in float64, from the definition."""
    out = {"nll": [], "dense": [], "kl": [], "same": []}
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        for t in range(len(part) - 1):
            logp, logq = (
                (row := d.forward(part[None])[0][0, t].astype(np.float64))
                - row.max()
                - np.log(np.exp(row - row.max()).sum())
                for d in (dense, decoder)
            )
            out["nll"].append(-logq[part[t + 1]])
            out["dense"].append(-logp[part[t + 1]])
            out["kl"].append((np.exp(logp) * (logp - logq)).sum())
            out["same"].append(logp.argmax() == logq.argmax())
    return {name: np.array(values, np.float64) for name, values in out.items()}


@pytest.mark.parametrize("offset", [0.0, 300.0, -300.0])
def test_against_brute_force(offset):
    shrunk, dense = fake(2, offset=offset), fake(3)
    found = accuracy(shrunk, dense, IDS, WINDOW)
    expected = brute_force(shrunk, dense, IDS, WINDOW)
    assert found.scored == len(expected["nll"]) == 3 * 31 + 6
    figures = {f.name: f for f in found.figures()}
    assert figures["accuracy.nll"].shrunk == pytest.approx(expected["nll"].mean(), rel=3e-6)
    assert figures["accuracy.nll"].baseline == pytest.approx(expected["dense"].mean(), rel=3e-6)
    assert figures["accuracy.perplexity"].shrunk == pytest.approx(math.exp(expected["nll"].mean()), rel=1e-5)
    assert figures["accuracy.perplexity"].ratio == pytest.approx(
        math.exp(expected["nll"].mean() - expected["dense"].mean()), rel=1e-5
    )
    assert figures["accuracy.kl"].shrunk == pytest.approx(expected["kl"].mean(), rel=3e-6)
    assert figures["accuracy.top1_agreement"].shrunk == expected["same"].mean()
    assert figures["accuracy.kl"].baseline is None


def test_windows_do_not_overlap_and_a_lone_last_token_is_dropped():
    found = accuracy(fake(2), None, IDS[: 2 * WINDOW + 1], WINDOW)
    assert found.tokens.tolist() == [31, 31]
    assert accuracy(fake(2), None, IDS[: 2 * WINDOW + 2], WINDOW).tokens.tolist() == [31, 31, 1]
    assert accuracy(fake(2), None, IDS[:2], WINDOW).scored == 1


def test_large_vocabulary_is_worked_on_in_chunks(monkeypatch):
    import slimexport.verification.perplexity as perplexity

    whole = accuracy(fake(2), fake(3), IDS, WINDOW)
    monkeypatch.setattr(perplexity, "_CHUNK", 1)  # one row at a time
    one = accuracy(fake(2), fake(3), IDS, WINDOW)
    for name in ("nll", "baseline_nll", "kl"):
        np.testing.assert_allclose(getattr(one, name), getattr(whole, name), rtol=1e-12)
    assert one.agreements.tolist() == whole.agreements.tolist()


def test_a_model_against_itself():
    figures = {f.name: f for f in accuracy(fake(2), fake(2), IDS, WINDOW).figures()}
    assert figures["accuracy.kl"].shrunk == 0
    assert figures["accuracy.top1_agreement"].shrunk == 1
    perplexity = figures["accuracy.perplexity"]
    assert perplexity.ratio == perplexity.ratio_low == perplexity.ratio_high == 1


def test_masked_vocabulary_gives_no_nan():
    shrunk, dense = fake(2), fake(3)
    ids = IDS % (VOCAB - 1)  # the masked token does not occur
    for decoder in (shrunk, dense):
        decoder.table[..., VOCAB - 1] = -np.inf
    found = accuracy(shrunk, dense, ids, WINDOW)
    cut = [FakeDecoder(d.table[:, :, : VOCAB - 1]) for d in (shrunk, dense)]
    without = accuracy(*cut, ids, WINDOW)
    np.testing.assert_allclose(found.kl, without.kl, rtol=1e-6)
    np.testing.assert_allclose(found.nll, without.nll, rtol=1e-6)


def test_without_a_baseline():
    found = accuracy(fake(2), None, IDS, WINDOW)
    assert [f.name for f in found.figures()] == ["accuracy.perplexity", "accuracy.nll"]
    assert all(f.ratio is None and f.baseline is None for f in found.figures())
    assert found.ratio_interval() is None
    json.dumps(found.to_dict())


def test_progress_ends_at_the_total():
    seen = []
    accuracy(fake(2), fake(3), IDS, WINDOW, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(IDS), len(IDS))
    assert seen == sorted(seen)


@pytest.mark.parametrize(("ids", "window"), [(IDS[:1], 32), (IDS[None], 32), (IDS, 1)])
def test_impossible_inputs(ids, window):
    with pytest.raises(BadInputError):
        accuracy(fake(2), None, ids, window)


def test_the_record_is_enough_to_recompute():
    found = accuracy(fake(2), fake(3), IDS, WINDOW)
    data = json.loads(json.dumps(found.to_dict()))
    assert math.exp(sum(data["window_nll"]) / data["scored_tokens"]) == pytest.approx(found.perplexity, rel=1e-12)
    assert sum(data["window_tokens"]) == data["scored_tokens"]


def test_interval_covers_the_true_ratio_and_profits_from_pairing():
    """Windows of very different difficulty, which both models feel: 95 % of the intervals hold the true ratio."""
    rng = np.random.default_rng(0)
    windows, true, hits, widths = 32, 0.2, 0, []
    for _ in range(1500):
        tokens = np.full(windows, 511)
        tokens[-1] = rng.integers(1, 512)
        hard = rng.normal(3, 0.8, windows)
        dense = hard * tokens
        shrunk = dense + (true + rng.normal(0, 0.05, windows)) * tokens
        made = Accuracy(512, tokens, shrunk, dense, np.zeros(windows), tokens)
        low, high = made.ratio_interval()
        hits += low <= math.exp(true) <= high
        widths.append(math.log(high / low))
    assert 0.92 <= hits / 1500 <= 0.97
    assert np.mean(widths) < 0.05  # unpaired it would be 2 * 1.96 * 0.8 * sqrt(2 / 32) = 0.78


def test_onnx_and_torch_agree(tmp_path):
    model = tiny_llama(scale=4.0)
    export_tiny(model, tmp_path / "onnx")
    found = accuracy(OnnxDecoder(tmp_path / "onnx", threads=1), None, IDS, WINDOW)
    assert torch_perplexity(model, IDS, WINDOW) == pytest.approx(found.perplexity, rel=1e-4)
