"""The logit check: passes on a true graph, and sees one wrong weight, a tie, and a graph that cannot do a step."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_fixture import VOCAB, export_tiny, tiny_llama

from slimexport.errors import BadInputError, NotReproducedError
from slimexport.runtime import OnnxDecoder
from slimexport.verification.numerics import TOLERANCES, check_export, compare_export


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def decoder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("numerics") / "onnx"
    export_tiny(model, path)
    return OnnxDecoder(path, threads=1)


def changed(model, name, change):
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other.get_parameter(name))
    return other


def test_a_true_graph_passes(model, decoder):
    result = check_export(decoder, model, seed=3)
    assert result["failure"] is None
    assert set(result["steps"]) == {"prefill", "decode", "chunk", "greedy", "last"}
    assert 0 < result["max_logit_difference"] < result["tolerance"] / 30
    assert result["mean_logit_difference"] < result["tolerance_mean"]
    assert result["greedy_tokens"] == 2 * 64
    assert result["greedy_equal"] + len(result["ties"]) == 2 * 64
    assert result == check_export(decoder, model, seed=3)


def test_differences_are_those_of_torch_decoding_with_its_cache(model, decoder):
    """The uncached reference and torch's own cached greedy decoding agree."""
    prompt = list(range(10, 30))
    assert check_export(decoder, model, prompts=[prompt], steps=20)["greedy_equal"] == 20
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, 20:]
    assert decoder.greedy(np.array(prompt), 20).tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize(
    "name", ["self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj", "input_layernorm"]
)
def test_a_weight_that_is_off_by_three_percent_is_seen(model, decoder, block, name):
    wrong = changed(model, f"model.layers.{block}.{name}.weight", lambda weight: weight.mul_(1.03))
    with pytest.raises(NotReproducedError, match="does not compute what the model computes") as caught:
        check_export(decoder, wrong)
    assert "tolerance" in str(caught.value)
    assert caught.value.exit_code == 5


def test_a_wrong_cache_is_seen_at_the_decode_step(model, decoder, monkeypatch):
    """A graph that is right without a past and wrong with one."""
    real = decoder.forward

    def forgets(ids, past=None, mask=None):
        logits, state = real(ids, past, mask)
        return (logits + 1 if past and past.length else logits), state

    monkeypatch.setattr(decoder, "forward", forgets)
    with pytest.raises(NotReproducedError, match="decode logits differ by up to 1"):
        check_export(decoder, model, steps=4)


def test_nan_and_failing_graphs_do_not_pass(model, decoder, monkeypatch):
    real = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda *a: (real(*a)[0] * np.nan, real(*a)[1]))
    with pytest.raises(NotReproducedError, match="nan"):
        check_export(decoder, model, steps=2)

    def fails(ids, past=None, mask=None):
        if past and past.length and ids.shape[1] > 1:
            raise BadInputError("no chunks")
        return real(ids, past, mask)

    monkeypatch.setattr(decoder, "forward", fails)
    with pytest.raises(NotReproducedError, match="no chunks"):
        check_export(decoder, model, steps=2)


def test_ties_are_named_and_do_not_fail(model, decoder):
    """Two vocabulary rows that are equal up to 1e-6: the graph and torch may choose either."""
    greedy = decoder.greedy(np.arange(12), 1)
    token, twin = int(greedy.tokens[0]), (int(greedy.tokens[0]) + 1) % VOCAB
    twins = changed(model, "lm_head.weight", lambda w: w[twin].copy_(w[token] * (1 + 1e-6)))

    class Swapped:
        """The graph of `twins`, seen through a decoder whose two equal columns changed places."""

        path, precision, last_only = decoder.path, decoder.precision, decoder.last_only
        fixed_batch, vocab_size = decoder.fixed_batch, decoder.vocab_size
        max_positions, strays = decoder.max_positions, 0.0
        room = decoder.room

        def forward(self, ids, past=None, mask=None):
            logits, state = decoder.forward(ids, past, mask)
            logits = logits.copy()
            logits[..., twin] = logits[..., token]
            logits[..., min(token, twin)] += 1e-6 * np.abs(logits[..., token])
            return logits, state

    result = compare_export(Swapped(), twins, prompts=[list(range(12))], steps=8)
    assert result["failure"] is None
    assert all(tie["gap"] <= result["tolerance"] for tie in result["ties"])
    assert result["ties"][0]["step"] == 0
    assert {result["ties"][0]["torch"], result["ties"][0]["onnx"]} == {token, twin}


def test_a_greedy_token_beyond_the_tolerance_fails_even_when_logits_pass(model, decoder, monkeypatch):
    from slimexport.verification import differences, numerics

    wide = {name: numerics.Tolerance(1e9, 1e9) for name in TOLERANCES}
    monkeypatch.setattr(numerics, "TOLERANCES", wide)
    result = compare_export(decoder, tiny_llama(seed=9), prompts=[list(range(12))], steps=8)
    assert result["failure"] is None  # everything is a tie within 1e9
    monkeypatch.setattr(numerics, "TOLERANCES", {name: numerics.Tolerance(1e-9, 1e9) for name in TOLERANCES})
    assert "greedy" not in str(compare_export(decoder, model, steps=2)["failure"])
    monkeypatch.setattr(differences.Track, "add", lambda self, got, expected: None)
    result = compare_export(decoder, tiny_llama(seed=9), prompts=[list(range(12))], steps=8)
    assert "greedy tokens differ, first at step" in result["failure"]


def test_masked_vocabulary_is_no_difference(model, decoder, monkeypatch):
    """-inf in both is equal."""
    real, head = decoder.forward, model.lm_head.forward

    def masked(*arguments):
        logits, state = real(*arguments)
        logits = logits.copy()
        logits[..., 5] = -np.inf
        return logits, state

    monkeypatch.setattr(decoder, "forward", masked)
    monkeypatch.setattr(
        model.lm_head, "forward", lambda x: head(x).index_fill(-1, torch.tensor([5]), -torch.inf), raising=False
    )
    assert compare_export(decoder, model, steps=4)["failure"] is None


def test_impossible_prompts_are_refused(model, decoder):
    with pytest.raises(BadInputError, match="needs 4"):
        check_export(decoder, model, prompts=[[1, 2, 3]])
    with pytest.raises(BadInputError, match="256 positions"):
        check_export(decoder, model, prompts=[[1] * 300])


def test_decoding_stops_where_the_positions_end(model, decoder):
    result = check_export(decoder, model, prompts=[[7] * 250], steps=64)
    assert result["greedy_tokens"] == 256 - 250 + 1


def test_half_precision_models_get_their_own_tolerance(model, decoder):
    half = copy.deepcopy(model).to(torch.bfloat16)
    result = compare_export(decoder, half, steps=4)
    assert result["precision"] == "bf16"
    assert result["failure"] is None
    assert result["max_logit_difference"] > TOLERANCES["fp32"].maximum * result["logit_spread"]
    other = compare_export(decoder, tiny_llama(seed=9).to(torch.bfloat16), steps=4)
    assert "in the mean" in other["failure"] or "by up to" in other["failure"]


def straying(decoder, monkeypatch, positions):
    """As if `decoder` were off by 50 at these positions, and allowed to be so at a twentieth of all."""
    real = decoder.forward

    def forward(ids, past=None, mask=None):
        logits, state = real(ids, past, mask)
        logits, start = logits.copy(), state.length - ids.shape[1]
        for position in positions:
            if start <= position < state.length:
                logits[:, position - start, ::2] += 50
        return logits, state

    monkeypatch.setattr(decoder, "forward", forward)
    monkeypatch.setattr(decoder, "strays", 0.05)


def test_a_few_positions_may_stray_where_the_decoder_says_so(model, decoder, monkeypatch):
    """111 positions of each prompt: 5 may, and 6 may not."""
    straying(decoder, monkeypatch, (3, 20, 37, 50, 90))
    result = check_export(decoder, model)
    assert sorted((stray["prompt"], stray["position"]) for stray in result["strays"]) == [
        (prompt, position) for prompt in (0, 1) for position in (3, 20, 37, 50, 90)
    ]
    assert result["max_logit_difference"] < result["tolerance"]
    assert result["greedy_equal"] < result["greedy_tokens"]
    straying(decoder, monkeypatch, (100,))
    with pytest.raises(NotReproducedError, match="logits differ by up to 50"):
        check_export(decoder, model)


def test_two_graphs_may_be_apart_where_rounding_alone_decides(model, decoder, monkeypatch):
    """2 of 111 positions of each prompt, not 3."""
    other = OnnxDecoder(Path(decoder.path).parent, threads=1)
    straying(decoder, monkeypatch, (37, 50))
    monkeypatch.setattr(decoder, "strays", 0.0)
    with pytest.raises(NotReproducedError, match="logits differ by up to 50"):
        check_export(decoder, model)
    result = check_export(decoder, other)
    assert {stray["position"] for stray in result["strays"]} == {37, 50}
    straying(decoder, monkeypatch, (60,))
    monkeypatch.setattr(decoder, "strays", 0.0)
    with pytest.raises(NotReproducedError, match="logits differ by up to 50"):
        check_export(decoder, other)


def test_nothing_strays_where_the_decoder_does_not_say_so(model, decoder, monkeypatch):
    straying(decoder, monkeypatch, (3,))
    monkeypatch.setattr(decoder, "strays", 0.0)
    with pytest.raises(NotReproducedError, match="prefill logits differ"):
        check_export(decoder, model)
