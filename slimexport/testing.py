"""What every family must pass, on tiny random models whose sizes all differ from each other: a family of your own too.

    from slimexport.testing import CHECKS, tiny_config

    @pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
    def test_my_family(check, tmp_path):
        check(tiny_config("my_family"), tmp_path)

A check raises AssertionError with what differs. It needs no network and takes seconds.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.architectures import architecture_of
from slimexport.architectures.weights import EXPERTS
from slimexport.artifacts import BlockSizes, CalibrationSet, ModelSource, PruningPlan, TextSource
from slimexport.config import RunConfig
from slimexport.loading import LoadedModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from slimexport.architectures.base import Architecture
    from slimexport.architectures.family import Kept
    from slimexport.architectures.weights import Weight

VOCAB = 211
BLOCKS = 3
LAYOUTS = ("per_layer", "uniform")

# Where a family can say head_dim, query heads together are narrower than the residual.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "num_hidden_layers": BLOCKS, "intermediate_size": 80, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 16, "hidden_size": 120, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
_HALF_TURNED: dict[str, Any] = {  # half of a head, in pieces of 16, is what ONNX Runtime's attention can turn
    "hidden_size": 192, "intermediate_size": 176,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}  # fmt: skip
_EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 12, "tie_word_embeddings": False},
    "ministral": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "ministral3": {"sliding_window": None},
    "qwen3": {"attention_bias": True},
    "gemma": {"attention_bias": True},
    "gemma2": {"sliding_window": 12, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0,
               "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3_text": {"sliding_window": 12, "query_pre_attn_scalar": 16,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "granite": {"attention_bias": True, "mlp_bias": True, "residual_multiplier": 0.5, "embedding_multiplier": 3.0,
                "logits_scaling": 2.0, "attention_multiplier": 0.2},
    "smollm3": {"attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 0, 1]},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "ernie4_5": {"use_bias": True},
    "helium": {"attention_bias": True, "mlp_bias": True, "hidden_size": 96},
    "cohere": {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5},
    "cohere2": {"hidden_size": 96, "sliding_window": 12, "logit_scale": 0.5,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "olmo": {"attention_bias": True},
    "olmo2": {"attention_bias": True},
    "olmo3": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "exaone4": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True},
    "phi": {**_HALF_TURNED, "head_dim": 32, "tie_word_embeddings": False},
    "phi3": {"tie_word_embeddings": False},
    "starcoder2": {"use_bias": True},
    "arcee": {"attention_bias": True, "mlp_bias": True},
    "nemotron": {"attention_bias": True, "mlp_bias": True},
    "stablelm": {"use_qkv_bias": True, **_HALF_TURNED},
    "gpt_neox": {**_HALF_TURNED, "tie_word_embeddings": False},
    "opt": {"hidden_size": 96, "ffn_dim": 80, "word_embed_proj_dim": 96},
    "gpt2": {"hidden_size": 96, "n_inner": 80},
    "gpt_bigcode": {"hidden_size": 96, "n_inner": 80, "multi_query": True},
    "falcon": {"hidden_size": 96, "ffn_hidden_size": 80, "num_kv_heads": 3, "new_decoder_architecture": True,
               "alibi": False, "bias": True},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 5, "num_experts_per_tok": 2, "residual_multiplier": 0.5},
    "phimoe": {"lm_head_bias": True, "tie_word_embeddings": False, "num_local_experts": 5, "num_experts_per_tok": 2},
    "olmoe": {"hidden_size": 96, "num_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    "qwen2_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
                  "shared_expert_intermediate_size": 56},
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # models of a family that differ in kind
    "gpt_bigcode, one group a head": ("gpt_bigcode", {"multi_query": False}),
    "falcon, one group": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "bias": False}),
    "falcon, one group a head": (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 6, "parallel_attn": False},
    ),
    "stablelm, side by side": ("stablelm", {"use_parallel_residual": True}),
    "gpt_neox, one after the other": ("gpt_neox", {"use_parallel_residual": False}),
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Of a known family, with `changes`; of another one with what its config has of the usual fields."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    known = {**kind().to_dict(), **getattr(kind, "attribute_map", {})}
    sizes = {name: value for name, value in _SIZES.items() if name in known or name in ("head_dim",)}
    if "head_dim" not in known and "hidden_size" in _EXTRAS.get(model_type, {}):
        del sizes["head_dim"]
    return kind(**{**sizes, **_EXTRAS.get(model_type, {}), **changes})


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> Any:
    """Random weights in float32, large enough that heads and channels matter, norms and biases too."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter) * (0.1 if name.endswith("bias") else 0.15)
        is_norm = (parameter.dim() == 1 and not name.endswith("bias")) or ("norm" in name and name.endswith("weight"))
        parameter.data = 1 + noise if is_norm else noise
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Word-level: three special tokens and 'w0', 'w1', ... to the end of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(VOCAB - 3)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )  # fmt: skip


# Checks ------------------------------------------------------------------------------------------------------------


def check_table(config: PreTrainedConfig, place: Path) -> None:
    """The table of weights is that of the model, and its counts are those of the tensors."""
    model = tiny_model(config)
    architecture = architecture_of(model.config, "tiny")
    tied = {"lm_head.weight"} if architecture.tied else set()
    real = {name: tuple(p.shape) for name, p in model.state_dict().items() if name not in tied}
    assert architecture.shapes() == real
    assert architecture.estimates(4).parameters == sum(p.numel() for p in model.parameters())
    assert architecture.block_linear_parameters(architecture.blocks[0]) == (
        architecture.attention_parameters(architecture.blocks[0])
        + architecture.blocks[0].channels * architecture.channel_parameters()
    )


def check_shrunk_equals_masked(config: PreTrainedConfig, place: Path) -> None:
    """Pruned with everything the default does, the smaller model computes what the dense one does with zeros where
    heads and channels went: every block of another size, and all of the same."""
    import torch

    for layout in LAYOUTS:
        dense = tiny_model(config)
        architecture, plan, small, trace = _pruned(copy.deepcopy(dense), layout)
        masked = copy.deepcopy(dense)
        _mask(masked, small, architecture, trace)
        ids = _ids(2, 24, seed=9)
        # In float64, so that nothing but the order of sums can differ.
        for model in (small, masked, dense) if architecture.family.experts else ():
            model.set_experts_implementation("eager")  # the default knows no float64
        ours, theirs = (_logits(m.double(), ids) for m in (copy.deepcopy(small), masked))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
        assert not torch.allclose(ours, _logits(dense.double(), ids), atol=1e-3), "pruning changed nothing"
        shapes = {name: tuple(p.shape) for name, p in small.state_dict().items()}
        architecture.with_blocks(plan.blocks).check_weights(shapes, "shrunk")
        assert plan.blocks != plan.dense


def check_reloaded(config: PreTrainedConfig, place: Path) -> None:
    """Saved and loaded the model gives the same logits, bit for bit, and generates the same tokens with its cache as
    without: by `slimexport.load`, and by stock transformers (with the file in the checkpoint where blocks differ).
    Tokenizer, chat template and generation config come along."""
    import torch
    from transformers import AutoModelForCausalLM

    from slimexport.checkpoint import load

    for layout in LAYOUTS:
        _, plan, small, _ = _pruned(tiny_model(config), layout)
        small.generation_config.max_time = 77.0
        directory = _saved(small, plan, place / layout)
        ids = _ids(2, 24, seed=9)
        expected = _logits(small, ids)
        again, tokenizer = load(directory)
        assert torch.equal(_logits(again, ids), expected)
        assert again.generation_config.max_time == 77.0
        assert tokenizer("w1 w200").input_ids == tiny_tokenizer()("w1 w200").input_ids
        assert tokenizer.chat_template == tiny_tokenizer().chat_template
        differ = len(set(plan.blocks)) > 1 or "per_layer_config" in json.loads((directory / "config.json").read_text())
        stock = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=differ).eval()
        assert torch.equal(_logits(stock, ids), expected)
        assert architecture_of(again.config, "again").blocks == plan.blocks
        for implementation in ("eager", *(["sdpa"] if again._supports_sdpa else [])):
            again.set_attn_implementation(implementation)
            torch.testing.assert_close(_logits(again, ids), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(_greedy(again, ids[:1, :8], cached=True), _greedy(again, ids[:1, :8], cached=False))


def check_pruned_again(config: PreTrainedConfig, place: Path) -> None:
    """A pruned model is a model like any other: it is pruned again, saved, and gives the same logits."""
    import torch

    from slimexport.checkpoint.load import load_weights

    for layout in LAYOUTS:
        _, plan, small, _ = _pruned(tiny_model(config), layout, ratio=0.08)
        first = load_weights(_saved(small, plan, place / layout))
        _, plan, smaller, _ = _pruned(first, layout, ratio=0.08)
        again = load_weights(_saved(smaller, plan, place / f"{layout} again"))
        ids = _ids(2, 24, seed=9)
        assert torch.equal(_logits(again, ids), _logits(smaller, ids))


def check_fresh_process(config: PreTrainedConfig, place: Path) -> None:
    """A process that knows nothing of this one reads the checkpoint and computes the same logits, bit for bit."""
    from slimexport.checkpoint.save import check_round_trip

    for layout in LAYOUTS:
        _, plan, small, _ = _pruned(tiny_model(config), layout)
        assert check_round_trip(small, _saved(small, plan, place / layout), seed=1) == 0.0


def check_bfloat16(config: PreTrainedConfig, place: Path) -> None:
    """Stored in bfloat16, and computed in float32 on the CPU: the checkpoint gives the same logits, bit for bit."""
    import torch

    from slimexport.checkpoint.load import load_weights

    model = tiny_model(config)
    for parameter in model.parameters():  # not the rotary frequencies
        parameter.data = parameter.data.to(torch.bfloat16)
    _, plan, small, _ = _pruned(model, "per_layer")
    again = load_weights(_saved(small, plan, place / "bfloat16"))
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    ids = _ids(2, 24, seed=9)
    assert torch.equal(_logits(again, ids), _logits(small, ids))


def check_exported(config: PreTrainedConfig, place: Path) -> None:
    """The pruned model's graph gives torch's logits in prefill, decode and chunk, its greedy tokens (in
    onnxruntime-genai too, where it is installed), and the same logits for two sequences of which one is padded on the
    right; in either layout."""
    import numpy as np
    import torch

    from slimexport.runtime import OnnxDecoder
    from slimexport.targets import registry
    from slimexport.targets.base import ExportOptions
    from slimexport.targets.builders import mobius
    from slimexport.verification.numerics import check_export

    for layout in LAYOUTS if mobius.knows(config) else LAYOUTS[:1]:
        small = _pruned(tiny_model(config), layout)[2]
        directory = place / layout
        directory.mkdir()

        def check(artifact: Any, model: Any = small) -> None:
            check_export(OnnxDecoder(Path(artifact.path), threads=1), model, steps=16)

        artifact = registry.get("onnx").export(small, tiny_tokenizer(), directory, ExportOptions(), check)
        assert mobius.knows(config) == (artifact.builder == "mobius"), artifact.notes
        ids = _ids(2, 20, seed=9)
        mask = torch.ones_like(ids)
        ids[1, 13:] = mask[1, 13:] = 0
        found, _ = OnnxDecoder(directory, threads=1).forward(ids.numpy(), attention_mask=mask.numpy())
        with torch.no_grad():
            expected = small(ids, attention_mask=mask, use_cache=False).logits
        real = mask.bool().numpy()
        np.testing.assert_allclose(found[real], expected.numpy()[real], rtol=1e-3, atol=5e-3)
        if importlib.util.find_spec("onnxruntime_genai"):
            prompt = ids[:1, :8]
            made = _greedy(small, prompt, cached=True, stop=True)[0].tolist()
            made = made[:-1] if made[-1] == config.eos_token_id else made  # genai leaves it out
            assert _generated_by_genai(directory, prompt[0].tolist(), len(made)) == made


Check = Callable[["PreTrainedConfig", Path], None]
CHECKS: dict[str, Check] = {
    "table": check_table,
    "shrunk equals masked": check_shrunk_equals_masked,
    "reloaded": check_reloaded,
    "pruned again": check_pruned_again,
    "bfloat16": check_bfloat16,
    "fresh process": check_fresh_process,
    "exported": check_exported,
}


# What the checks share ----------------------------------------------------------------------------------------------


def _ids(sequences: int, length: int, seed: int) -> torch.Tensor:
    import torch

    return torch.randint(3, VOCAB, (sequences, length), generator=torch.Generator().manual_seed(seed))


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.no_grad():
        logits: torch.Tensor = model(ids, use_cache=False).logits
    return logits


def _greedy(model: Any, ids: torch.Tensor, *, cached: bool, stop: bool = False, tokens: int = 8) -> torch.Tensor:
    """Prompt and `tokens` greedy ones; `stop`: fewer where the end token comes first."""
    least = 0 if stop else tokens
    made: torch.Tensor = model.generate(
        ids, max_new_tokens=tokens, min_new_tokens=least, do_sample=False, use_cache=cached, pad_token_id=0
    )
    return made


def _generated_by_genai(directory: Path, prompt: list[int], length: int) -> list[int]:
    """Greedy, until the end token or `length` tokens with the prompt."""
    import numpy as np
    import onnxruntime_genai as og

    model = og.Model(str(directory))
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=length, min_length=0, do_sample=False)
    generator = og.Generator(model, settings)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def _pruned(
    model: Any, layout: str, ratio: float | None = None
) -> tuple[Architecture, PruningPlan, Any, tuple[Any, ...]]:
    """Prunes `model` in place as `slimexport run` would: (its dense architecture, plan, model, trace)."""
    from slimexport.pruning.planner import make_plan
    from slimexport.pruning.stage import prune_model

    architecture = architecture_of(model.config, "tiny")
    if ratio is None:
        ratio = 0.4 if _heads_go(architecture, layout) else 0.2
    allocation = "uniform" if layout == "uniform" else "incremental"
    plan = make_plan(architecture, ratio=ratio, criterion="slimgpt", allocation=allocation, layout=layout, round_to=8)
    stored = str(next(model.parameters()).dtype).removeprefix("torch.")
    source = ModelSource("tiny", "directory", ".", None, "0" * 16, stored)
    ids = _ids(12, 32, seed=3)
    made = prune_model(
        LoadedModel(model, None, architecture, source),
        plan,
        CalibrationSet(ids, TextSource("random", ids.numel(), "0" * 64), 0),
        RunConfig(model="tiny", device="cpu", group_size_start=8, curvature_tokens=128),
    )
    return architecture, plan, made.model, made.trace


def _heads_go(architecture: Architecture, layout: str) -> bool:
    dense = architecture.blocks[0]
    fewer = [s for s in architecture.legal_heads(dense) if s != (dense.kv_groups, dense.heads_per_group)]
    return any(
        layout == "per_layer" or architecture.plain_config_can_say(BlockSizes(groups, per_group, dense.channels))
        for groups, per_group in fewer
    )


def _mask(masked: Any, small: Any, architecture: Architecture, trace: tuple[Any, ...]) -> None:
    """Puts every tensor of `small` into the dense `masked`, at the places that were kept; the output matrices are zero
    elsewhere, so that nothing sees the heads and channels that went."""

    from slimexport.pruning.blocks import kept_of

    family = architecture.family
    blocks, thin = (m.get_submodule(family.blocks) for m in (masked, small))
    outputs = (family.attention_weight, family.ffn_weight)
    for block, own, of in zip(blocks, thin, trace, strict=True):
        kept = kept_of(of, architecture.blocks[of.block], architecture.experts)
        assert len(kept.query_heads) * architecture.head_dim in own.get_parameter(outputs[0]).shape
        for weight in architecture.block_weights():
            full, part = block.get_parameter(weight.name).data, own.get_parameter(weight.name).data
            if weight.name in outputs:
                full.zero_()
            _put(architecture, weight, kept, full, part)
    for weight in family.model_weights:
        if weight.name in dict(small.named_parameters()):
            masked.get_parameter(weight.name).data.copy_(small.get_parameter(weight.name).data)


def _put(architecture: Architecture, weight: Weight, kept: Kept, full: torch.Tensor, part: torch.Tensor) -> None:
    """Puts `part`, a weight of a shrunk block, into `full`, the same of the dense one, at the places that were kept."""
    import torch

    if weight.axes[0] == EXPERTS:
        one = replace(weight, axes=weight.axes[1:])
        for expert in range(architecture.experts):
            _put(architecture, one, kept.of_expert(expert), full[expert], part[expert])
        return
    indices = [architecture.axis_index(axis, kept) for axis in weight.axes]
    where = [
        torch.arange(length) if index is None else torch.tensor(index)
        for length, index in zip(full.shape, indices, strict=True)
    ]
    full[torch.meshgrid(*where, indexing="ij")] = part


def _saved(model: Any, plan: PruningPlan, directory: Path) -> Path:
    from slimexport.checkpoint.save import save_checkpoint

    directory.mkdir(parents=True)
    architecture = architecture_of(model.config, "tiny")
    save_checkpoint(model, tiny_tokenizer(), architecture, plan, directory, card="")
    return directory
