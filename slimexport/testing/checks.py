"""The checks: each takes the config of a tiny model and a directory of its own."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.architectures import architecture_of
from slimexport.testing.models import tiny_model, tiny_tokenizer
from slimexport.testing.steps import (
    generated_by_genai,
    gives_tuples,
    greedy,
    layouts,
    logits,
    mask_like,
    pruned,
    random_ids,
    saved,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_table(config: PreTrainedConfig, place: Path) -> None:
    """The table of weights is that of the model, and its counts are those of the tensors; its blocks give what it says,
    and attend as it says."""
    model = tiny_model(config)
    architecture = architecture_of(model.config, "tiny")
    tied = {"lm_head.weight"} if architecture.tied else set()
    real = {name: tuple(p.shape) for name, p in model.state_dict().items() if name not in tied}
    assert architecture.shapes() == real
    assert architecture.estimates(4).parameters == sum(map(math.prod, real.values()))
    for own, sizes in zip(architecture.by_block, architecture.blocks, strict=True):
        assert own.block_linear_parameters(sizes) == (
            own.attention_parameters(sizes) + sizes.channels * own.channel_parameters()
        )
    family = architecture.family
    assert gives_tuples(model, family.blocks) == family.returns_tuple
    assert family.eager == (not model._supports_sdpa)


def check_shrunk_equals_masked(config: PreTrainedConfig, place: Path) -> None:
    """Pruned with everything the default does, the smaller model computes what the dense one does with zeros where
    heads and channels went: every block of another size, and all of the same."""
    import torch

    for layout in layouts(config):
        dense = tiny_model(config)
        architecture, plan, small, trace = pruned(copy.deepcopy(dense), layout)
        masked = copy.deepcopy(dense)
        mask_like(masked, small, architecture, trace)
        ids = random_ids(2, 24, seed=9)
        # In float64, so that nothing but the order of sums can differ.
        for model in (small, masked, dense) if architecture.family.experts else ():
            model.set_experts_implementation("eager")  # the default knows no float64
        ours, theirs = (logits(m.double(), ids) for m in (copy.deepcopy(small), masked))
        # Some families leave float64 on the way to their logits (a softcap in float32): there a last bit may differ.
        rtol, atol = (1e-8, 1e-8) if ours.dtype == torch.float64 else (1e-5, 2e-6)
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
        assert not torch.allclose(ours, logits(dense.double(), ids), atol=1e-3), "pruning changed nothing"
        shapes = {name: tuple(p.shape) for name, p in small.state_dict().items()}
        architecture.with_blocks(plan.blocks).check_weights(shapes, "shrunk")
        assert plan.blocks != plan.dense


def check_reloaded(config: PreTrainedConfig, place: Path) -> None:
    """Saved and loaded the model gives the same logits, bit for bit, and generates the same tokens with its cache as
    without: by `slimexport.load`, and by stock transformers (with the file in the checkpoint where blocks differ).
    Tokenizer, chat template and generation config come along."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    from slimexport.checkpoint import load

    config.save_pretrained(place / "dense")
    tiny_tokenizer().save_pretrained(place / "dense")
    given = AutoTokenizer.from_pretrained(place / "dense")  # some families read any tokenizer as their own kind
    for layout in layouts(config):
        _, plan, small, _ = pruned(tiny_model(config), layout)
        small.generation_config.max_time = 7777.0
        directory = saved(small, plan, place / layout)
        ids = random_ids(2, 24, seed=9)
        expected = logits(small, ids)
        again, tokenizer = load(directory)
        assert torch.equal(logits(again, ids), expected)
        assert again.generation_config.max_time == 7777.0
        assert tokenizer("w1 w200").input_ids == given("w1 w200").input_ids
        assert tokenizer.chat_template == given.chat_template
        differ = len(set(plan.blocks)) > 1 or "per_layer_config" in json.loads((directory / "config.json").read_text())
        stock = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=differ).eval()
        assert torch.equal(logits(stock, ids), expected)
        if differ:
            # Without its head, as embedders and vLLM's transformers backend ask for it.
            inner = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
            whole = stock(ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
            assert torch.equal(inner(ids, use_cache=False).last_hidden_state, whole)
        assert architecture_of(again.config, "again").blocks == plan.blocks
        for implementation in ("eager", *(["sdpa"] if again._supports_sdpa else [])):
            again.set_attn_implementation(implementation)
            torch.testing.assert_close(logits(again, ids), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(greedy(again, ids[:1, :8], cached=True), greedy(again, ids[:1, :8], cached=False))


def check_pruned_again(config: PreTrainedConfig, place: Path) -> None:
    """A pruned model is a model like any other: it is pruned again, saved, and gives the same logits."""
    import torch

    from slimexport.checkpoint.load import load_weights

    for layout in layouts(config):
        _, plan, small, _ = pruned(tiny_model(config), layout, ratio=0.08)
        first = load_weights(saved(small, plan, place / layout))
        _, plan, smaller, _ = pruned(first, layout, ratio=0.08)
        again = load_weights(saved(smaller, plan, place / f"{layout} again"))
        ids = random_ids(2, 24, seed=9)
        assert torch.equal(logits(again, ids), logits(smaller, ids))


def check_fresh_process(config: PreTrainedConfig, place: Path) -> None:
    """A process that knows nothing of this one reads the checkpoint and computes the same logits, bit for bit."""
    from slimexport.checkpoint.save import check_round_trip

    for layout in layouts(config):
        _, plan, small, _ = pruned(tiny_model(config), layout)
        assert check_round_trip(small, saved(small, plan, place / layout), seed=1) == 0.0


def check_bfloat16(config: PreTrainedConfig, place: Path) -> None:
    """Stored in bfloat16, and computed in float32 on the CPU: the checkpoint gives the same logits, bit for bit."""
    import torch

    from slimexport.checkpoint.load import load_weights
    from slimexport.precisions import cast_parameters, stays_in_float32

    model = tiny_model(config)
    cast_parameters(model, torch.bfloat16)
    _, plan, small, _ = pruned(model, "per_layer")
    again = load_weights(saved(small, plan, place / "bfloat16"))
    of = {name: p.dtype for name, p in again.named_parameters()}
    assert of == {n: torch.float32 if stays_in_float32(again, n, torch.bfloat16) else torch.bfloat16 for n in of}
    ids = random_ids(2, 24, seed=9)
    assert torch.equal(logits(again, ids), logits(small, ids))


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

    for layout in layouts(config) if mobius.knows(config) else layouts(config)[:1]:
        small = pruned(tiny_model(config), layout)[2]
        directory = place / layout
        directory.mkdir()

        def check(artifact: Any, reference: Any = None, model: Any = small) -> None:
            against = OnnxDecoder(Path(reference.path), threads=1) if reference else model
            check_export(OnnxDecoder(Path(artifact.path), threads=1), against, steps=16)

        artifact = registry.get("onnx").export(small, tiny_tokenizer(), directory, ExportOptions(), check)
        assert mobius.knows(config) == (artifact.builder == "mobius"), artifact.notes
        ids = random_ids(2, 20, seed=9)
        mask = torch.ones_like(ids)
        ids[1, 13:] = mask[1, 13:] = 0
        decoder = OnnxDecoder(directory, threads=1)
        grows = architecture_of(small.config, "tiny").estimates(4).kv_cache_bytes_per_token
        assert decoder.kv_bytes_per_token == grows
        found, _ = decoder.forward(ids.numpy(), attention_mask=mask.numpy())
        with torch.no_grad():
            expected = small(ids, attention_mask=mask, use_cache=False).logits
        real = mask.bool().numpy()
        np.testing.assert_allclose(found[real], expected.numpy()[real], rtol=1e-3, atol=5e-3)
        if importlib.util.find_spec("onnxruntime_genai") and (directory / "genai_config.json").is_file():
            prompt = ids[:1, :8]
            made = greedy(small, prompt, cached=True, stop=True)[0].tolist()
            made = made[:-1] if made[-1] == config.eos_token_id else made  # genai leaves it out
            assert generated_by_genai(directory, prompt[0].tolist(), len(made)) == made


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
