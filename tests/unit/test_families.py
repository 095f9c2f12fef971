"""Every family against the conformance suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimexport.architectures import architecture_of, registry
from slimexport.errors import BadInputError
from slimexport.stages.inputs import check_exportable
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


def test_a_model_without_a_graph_is_refused_before_and_after(tmp_path: Path) -> None:
    config = tiny_config("qwen3_next", mlp_only_layers=[0])
    with pytest.raises(BadInputError, match=r"qwen3_next models .* not exported: .*`slimexport prune`"):
        check_exportable(config, architecture_of(config, "tiny"))
    with pytest.raises(BadInputError, match="loop whose length is that of the traced text"):
        targets.get("onnx").export(tiny_model(config), tiny_tokenizer(), tmp_path, ExportOptions())
