"""The tables of weights against the models that transformers builds."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, tiny_config, tiny_model

from slimexport.architectures import architecture_of
from slimexport.architectures.family import Kept
from slimexport.artifacts import BlockSizes
from slimexport.errors import BadInputError


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_table_equals_the_tensors_of_the_model(family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    table = architecture_of(model.config, "tiny").shapes()
    real = {n: tuple(p.shape) for n, p in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    assert table == real


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_follow_from_the_tensors(family: str) -> None:
    model = tiny_model(family)
    architecture = architecture_of(model.config, "tiny")
    estimates = architecture.estimates(4)
    assert estimates.parameters == sum(p.numel() for p in model.parameters())
    matrices = [m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n]
    assert estimates.block_parameters == sum(matrices)
    assert architecture.channel_parameters() == 3 * 96
    assert estimates.kv_cache_bytes_per_token == 3 * 2 * 3 * 16 * 4


def test_flops_equal_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model("llama", attention_bias=False, mlp_bias=False)
    model.set_attn_implementation("eager")
    length = 40
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(length)[None], use_cache=False)
    scores = 3 * 2 * 2 * 6 * 16 * length * length  # QK^T and PV of eager attention, which computes the whole square
    estimates = architecture_of(model.config, "tiny").estimates(4)
    rotary = counter.get_total_flops() - scores - length * estimates.prefill_flops_per_token
    assert 0 <= rotary <= 4 * length * 16  # the table of angles is a tiny product of its own


def test_decode_reads_the_embedding_only_as_lm_head() -> None:
    tied = architecture_of(tiny_config("llama", tie_word_embeddings=True), "tiny").estimates(4)
    free = architecture_of(tiny_config("llama", tie_word_embeddings=False), "tiny").estimates(4)
    assert tied.decode_bytes_per_token == free.decode_bytes_per_token
    assert free.bytes - tied.bytes == 211 * 96 * 4


def test_slicing_takes_whole_heads_and_channels() -> None:
    model = tiny_model("qwen3")
    architecture = architecture_of(model.config, "tiny")
    kept = Kept(kv_groups=(0, 2), query_heads=(1, 4), channels=(3, 5, 70), of=architecture.blocks[0])
    state = model.model.layers[0].state_dict()
    sliced = {w.name: architecture.slice_weight(w, state[w.name], kept) for w in architecture.block_weights()}
    assert {n: tuple(t.shape) for n, t in sliced.items()} == architecture.block_shapes(BlockSizes(2, 1, 3))
    rows = [*range(16, 32), *range(64, 80)]
    torch.testing.assert_close(sliced["self_attn.q_proj.weight"], state["self_attn.q_proj.weight"][rows])
    torch.testing.assert_close(sliced["self_attn.o_proj.weight"], state["self_attn.o_proj.weight"][:, rows])
    groups = [*range(16), *range(32, 48)]
    torch.testing.assert_close(sliced["self_attn.v_proj.bias"], state["self_attn.v_proj.bias"][groups])
    torch.testing.assert_close(sliced["mlp.down_proj.weight"], state["mlp.down_proj.weight"][:, [3, 5, 70]])
    torch.testing.assert_close(sliced["self_attn.q_norm.weight"], state["self_attn.q_norm.weight"])


def test_unsupported_family_names_itself_and_the_supported_ones() -> None:
    from transformers import BertConfig, BloomConfig, T5Config

    with pytest.raises(BadInputError, match=r"'bloom'.*`slimexport architectures` lists"):
        architecture_of(BloomConfig(), "model X")
    bert = BertConfig()
    bert.architectures = ["BertModel"]
    with pytest.raises(BadInputError, match=r"BertModel.*no decoder-only"):
        architecture_of(bert, "model X")
    with pytest.raises(BadInputError, match="no decoder-only"):
        architecture_of(T5Config(), "model X")


def test_sizes_that_contradict_each_other() -> None:
    with pytest.raises(BadInputError, match="not a multiple"):
        architecture_of(tiny_config("mistral", num_attention_heads=6, num_key_value_heads=4), "model X")


def test_weights_that_contradict_the_config() -> None:
    architecture = architecture_of(tiny_config("llama"), "tiny")
    shapes = dict(architecture.shapes())
    shapes["model.layers.1.mlp.up_proj.weight"] = (79, 96)
    with pytest.raises(BadInputError, match=r"layers.1.mlp.up_proj.weight has shape \[79, 96\].*\[80, 96\]"):
        architecture.check_weights(shapes, "tiny")
    del shapes["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(BadInputError, match=r"up_proj\.weight is missing"):
        architecture.check_weights(shapes, "tiny")
