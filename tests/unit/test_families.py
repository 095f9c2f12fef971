"""Every family against the conformance suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slimexport.architectures import architecture_of, registry
from slimexport.config import RunConfig
from slimexport.errors import BadInputError
from slimexport.stages.inputs import check_possible
from slimexport.targets import registry as targets
from slimexport.targets.base import ExportOptions
from slimexport.targets.builders import mobius
from slimexport.testing import CHECKS, kinds, tiny_config, tiny_model, tiny_tokenizer

IN_CI = ("gpt2", "falcon", "phi3", "qwen2_moe", "lfm2")
# Of these every check that takes a second or two is made each time; of the others those that find most.
OFTEN = (
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gemma", "gemma2",
    "gemma3_text", "phi", "phi3", "olmo2", "olmo3", "granite", "smollm3", "starcoder2", "cohere", "stablelm", "exaone4",
    "gpt_neox", "opt", "gpt2", "gpt_bigcode", "falcon", "lfm2_moe", "glm4_moe", "qwen3_5_text", "apertus",
    "gpt_oss", "youtu", "deepseek_v3", "qwen3_next",
)  # fmt: skip
SELDOM = ("pruned again", "bfloat16", "exported")
MODELS = kinds()


def cases() -> list[object]:
    """What takes longer than a second is slow: a graph that is traced (half a minute), another process (ten seconds);
    so is what of so many families adds up. Of these CI does a few kinds, `make test-full` all."""
    made = []
    for model, (family, changes) in MODELS.items():
        traced = not mobius.knows(tiny_config(family, **changes))
        never = traced and bool(registry.get(family).no_trace)
        for check in (check for check in CHECKS if not never or check != "exported"):
            marks = []
            often = model in OFTEN or check not in SELDOM
            if check == "fresh process" or (traced and check == "exported") or not often:
                marks = [pytest.mark.slow, *([] if model in IN_CI else [pytest.mark.long])]
            made.append(pytest.param(model, check, marks=marks))
    return made


@pytest.mark.parametrize(("model", "check"), cases())
def test_conformance(model: str, check: str, tmp_path: Path) -> None:
    family, changes = MODELS[model]
    CHECKS[check](tiny_config(family, **changes), tmp_path)


@pytest.mark.parametrize(
    ("changes", "exporter"),
    [
        ({"mlp_only_layers": [0]}, "auto"),
        ({}, "transformers"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "auto"),
    ],
)
def test_a_model_without_a_graph_is_refused_before_and_after(
    changes: dict[str, Any], exporter: str, tmp_path: Path
) -> None:
    config = tiny_config("qwen3_next", **changes)
    with pytest.raises(BadInputError, match=r"qwen3_next models .* no graph of them: .*`--target safetensors`"):
        check_possible(config, None, architecture_of(config, "tiny"), RunConfig(model="tiny", exporter=exporter))
    check_possible(config, None, architecture_of(config, "tiny"), RunConfig(model="tiny", target="safetensors"))
    with pytest.raises(BadInputError, match="loop whose length is that of the traced text"):
        targets.get("onnx").export(tiny_model(config), tiny_tokenizer(), tmp_path, ExportOptions(builder=exporter))


def test_a_family_without_a_table_is_left_to_the_builder_that_traces() -> None:
    from transformers import CodeGenConfig

    config = CodeGenConfig(vocab_size=64, n_positions=64, n_embd=64, n_layer=1, n_head=4, rotary_dim=8)
    assert not mobius.knows(config)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_key_value_heads": 3}, "a key of its own"),
        ({"v_head_dim": None}, "v_head_dim"),
        ({"q_lora_rank": 0}, "q_lora_rank"),
    ],
)
def test_latents_that_cannot_be(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(BadInputError, match=f"This youtu model cannot be pruned: .*{why}"):
        architecture_of(tiny_config("youtu", **changes), "tiny")
