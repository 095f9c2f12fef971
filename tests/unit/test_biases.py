"""Biases that a criterion compensates by: real ones where the family's config can say them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import tiny_model
from test_engine import calibration, config, loaded, logits, planned

from slimexport.errors import BadInputError
from slimexport.pruning.biases import with_output_biases
from slimexport.pruning.stage import prepare, prune_model


def bare_llama() -> Any:
    return tiny_model("llama", attention_bias=False, mlp_bias=False)


def test_new_biases_are_zero_and_change_nothing() -> None:
    dense = bare_llama()
    before = logits(dense)
    made = with_output_biases(loaded(dense), required=True)
    assert made.model.config.attention_bias
    assert made.model.config.mlp_bias
    assert torch.equal(logits(made.model), before)
    shapes = {n: tuple(p.shape) for n, p in made.model.state_dict().items()}
    made.architecture.check_weights(shapes, "with biases")
    assert "model.layers.0.mlp.down_proj.bias" in made.architecture.shapes()


def attention_of_block_0(model: Any, ids: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _m, _a, out: seen.append(out))
    logits(model, ids)
    handle.remove()
    return seen[0]


def test_flap_keeps_its_biases_and_they_help() -> None:
    """In block 0, whose inputs are the dense ones: there the bias makes the mean of the output right."""
    dense, text = bare_llama(), calibration()
    plan = planned(dense, 0.5, criterion="flap", allocation="uniform", head_weight=1.0)
    assert plan.blocks[0].query_heads < plan.dense[0].query_heads
    settings = config(criterion="flap", ratio=0.5)
    made = prune_model(prepare(loaded(copy.deepcopy(dense)), settings), plan, text, settings)
    small = made.model
    assert all(bool(block.mlp.down_proj.bias.any()) for block in small.model.layers)
    without = copy.deepcopy(small)
    without.model.layers[0].self_attn.o_proj.bias.data.zero_()
    wanted, found, plain = (attention_of_block_0(m, text.input_ids) for m in (dense, small, without))
    torch.testing.assert_close(found.mean((0, 1)), wanted.mean((0, 1)), rtol=1e-3, atol=1e-4)
    assert float((found - wanted).norm()) < float((plain - wanted).norm())
    direct = float((found - wanted).square().sum() / wanted.square().sum())
    assert made.trace[0].attention_error == pytest.approx(direct, rel=1e-4)


def test_a_family_without_biases_says_so() -> None:
    dense = tiny_model("mistral")
    with pytest.raises(BadInputError, match=r"mistral has no bias on self_attn\.o_proj"):
        prepare(loaded(dense), config(criterion="flap", ratio=0.4, bias_compensation="on"))
    settings = config(criterion="flap", ratio=0.4)
    small = prune_model(
        prepare(loaded(dense), settings), planned(dense, 0.4, criterion="flap"), calibration(), settings
    )
    assert any("has no bias" in note for trace in small.trace for note in trace.notes)


def test_off_leaves_the_model_as_it_is() -> None:
    dense = bare_llama()
    settings = config(criterion="flap", ratio=0.4, bias_compensation="off")
    made = prepare(loaded(dense), settings)
    assert made.architecture.flags == loaded(dense).architecture.flags
    small = prune_model(made, planned(dense, 0.4, criterion="flap"), calibration(), settings)
    assert not any("bias" in name for name in small.model.state_dict())
