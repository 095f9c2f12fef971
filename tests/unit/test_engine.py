"""The block-by-block loop against a slow, direct one, and the shrunk model against the masked dense model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, VOCAB, tiny_model

from slimexport.architectures import architecture_of
from slimexport.architectures.family import Kept
from slimexport.artifacts import BlockTrace, CalibrationSet, ModelSource, PruningPlan, TextSource
from slimexport.config import RunConfig
from slimexport.errors import BadInputError
from slimexport.loading import LoadedModel, load_model
from slimexport.pruning.blocks import DirectorySink, kept_of
from slimexport.pruning.criteria import Site
from slimexport.pruning.criteria import registry as criteria
from slimexport.pruning.curvature import BlockCurvature, Weighting
from slimexport.pruning.forward import _to_device, working_copy
from slimexport.pruning.planner import make_plan
from slimexport.pruning.stage import curvature_of, prune_model, settings_of
from slimexport.pruning.states import Keeper, Room
from slimexport.testing import models as testing
from slimexport.testing.models import tiny_tokenizer

TEXT = TextSource("random", 0, "0" * 64)


def calibration(sequences: int = 12, length: int = 32, seed: int = 3) -> CalibrationSet:
    ids = torch.randint(VOCAB, (sequences, length), generator=torch.Generator().manual_seed(seed))
    return CalibrationSet(ids, TEXT, seed)


def loaded(model: Any) -> LoadedModel:
    source = ModelSource("tiny", "directory", ".", None, "f", str(model.dtype).removeprefix("torch."))
    return LoadedModel(model, None, architecture_of(model.config, "tiny"), source)  # type: ignore[arg-type]


def planned(model: Any, ratio: float, **options: Any) -> PruningPlan:
    defaults = {"criterion": "slimgpt", "allocation": "incremental", "layout": "per_layer", "round_to": 4}
    return make_plan(architecture_of(model.config, "tiny"), ratio=ratio, **{**defaults, **options})


def config(**changes: Any) -> RunConfig:
    return RunConfig(model="tiny", device="cpu", group_size_start=8, **changes)


def mask_block(block: Any, architecture: Any, kept: Kept, full: dict[str, torch.Tensor]) -> None:
    """The dense twin of a shrunk block: full-size output matrices with zeros in the columns that went, which makes
    removed heads and channels invisible to the rest of the model."""
    for weight in architecture.block_weights():
        if weight.name in full:
            block.get_parameter(weight.name).data.copy_(full[weight.name])
            for dim, axis in enumerate(weight.axes):
                index = architecture.axis_index(axis, kept)
                if index is not None:
                    gone = torch.ones(full[weight.name].shape[dim], dtype=torch.bool)
                    gone[index] = False
                    assert not full[weight.name].index_select(dim, gone.nonzero().flatten()).any()


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    ids = calibration(2, 20, seed=9).input_ids if ids is None else ids
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["per_layer", "uniform"])
@pytest.mark.parametrize("criterion", ["slimgpt", "magnitude"])
def test_shrunk_model_equals_the_masked_dense_model(family: str, layout: str, criterion: str) -> None:
    dense = tiny_model(family)
    plan = planned(
        dense, 0.4, layout=layout, criterion=criterion, allocation="uniform" if layout == "uniform" else "incremental"
    )
    small = prune_model(loaded(copy.deepcopy(dense)), plan, calibration(), config())
    architecture = architecture_of(dense.config, "tiny")
    masked = copy.deepcopy(dense)
    for block, thin, trace in zip(masked.model.layers, small.model.model.layers, small.trace, strict=True):
        kept = kept_of(trace, plan.dense[trace.block])
        assert kept.sizes == plan.blocks[trace.block]
        full = {}
        for name, axis in (("self_attn.o_proj.weight", "query"), ("mlp.down_proj.weight", "channels")):
            full[name] = torch.zeros_like(block.get_parameter(name))
            full[name][:, architecture.axis_index(axis, kept)] = thin.get_parameter(name)
        # Up and gate projection are fitted too; their rows that went do not matter.
        for name in ("mlp.up_proj.weight", "mlp.gate_proj.weight"):
            full[name] = torch.zeros_like(block.get_parameter(name))
            full[name][list(kept.channels)] = thin.get_parameter(name)
        mask_block(block, architecture, kept, full)
    masked.model.norm.weight.data.copy_(small.model.model.norm.weight)
    # float64, so that nothing but the order of sums can differ
    torch.testing.assert_close(logits(small.model.double()), logits(masked.double()), rtol=1e-9, atol=1e-9)
    shapes = {n: tuple(p.shape) for n, p in small.model.state_dict().items()}
    architecture.with_blocks(plan.blocks).check_weights(shapes, "shrunk")
    assert not torch.allclose(logits(small.model.double()), logits(dense.double()), atol=1e-3)


def slow_engine(
    model: Any, plan: PruningPlan, ids: torch.Tensor, curvature: Sequence[BlockCurvature]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """SlimGPT done the direct way: the whole masked model runs, from the embedding, for every single matrix."""
    architecture = architecture_of(model.config, "tiny")
    results = []
    for index, block in enumerate(model.model.layers):
        done = []
        for name, axis in (("self_attn.o_proj", "query"), ("mlp.down_proj", "channels")):
            module, seen = block.get_submodule(name), []
            handle = module.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
            logits(model, ids)
            handle.remove()
            X = seen[0].reshape(-1, seen[0].shape[-1]).double()
            site = Site(module.weight.double(), X.T @ X / len(X), X.mean(0), plan.dense[index], plan.blocks[index],
                        architecture.head_dim, 8, 1, 0.01)  # fmt: skip
            if curvature:
                site = dataclasses.replace(site, weighting=Weighting.of(curvature[index][name], torch.device("cpu")))
            criterion = criteria.get(plan.criterion)
            selection, _ = (criterion.heads if axis == "query" else criterion.channels)(site)
            module.weight.data = selection.W.to(module.weight.dtype)
            done.append(selection.W)
        results.append((done[0], done[1]))
    return results


@pytest.mark.parametrize("weighted", [0, 128], ids=["plain", "weighted"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_engine_equals_the_direct_algorithm(family: str, weighted: int) -> None:
    dense = tiny_model(family)
    plan, text = planned(dense, 0.4), calibration()
    settings = config(refit=0.0, curvature_tokens=weighted)
    small = prune_model(loaded(copy.deepcopy(dense)), plan, text, settings)
    curvature = curvature_of(loaded(dense), text, settings)
    expected = slow_engine(copy.deepcopy(dense), plan, text.input_ids, curvature)
    architecture = architecture_of(dense.config, "tiny")
    for trace, block, (heads, channels) in zip(small.trace, small.model.model.layers, expected, strict=True):
        kept = kept_of(trace, plan.dense[trace.block])
        columns = architecture.axis_index("query", kept)
        torch.testing.assert_close(block.self_attn.o_proj.weight.double(), heads[:, columns], rtol=1e-3, atol=1e-4)
        down = block.mlp.down_proj.weight.double()
        torch.testing.assert_close(down, channels[:, list(kept.channels)], rtol=1e-3, atol=1e-4)


def test_compensation_helps_in_every_block() -> None:
    dense = tiny_model("llama")
    small = prune_model(loaded(dense), planned(dense, 0.4), calibration(), config())
    pruned = [t for t in small.trace if t.attention_error_before]
    assert pruned
    for trace in pruned:
        assert 0 < trace.attention_error < trace.attention_error_before
    for trace in small.trace:
        assert trace.ffn_error <= trace.ffn_error_before


def test_routers_are_not_rounded_for_half_precision() -> None:
    """Biases that are nearly alike would send tokens to other experts than the stored model does."""
    model = testing.tiny_model(testing.tiny_config("deepseek_v3"))
    whole = loaded(model)
    settings = settings_of(model, config(dtype="bfloat16"), torch.device("cpu"), torch.float32)
    block = model.get_submodule(f"{whole.architecture.family.blocks}.1")
    work = dict((copied := working_copy(block, settings)).named_parameters())
    assert "mlp.gate.weight" in work
    for name in work:
        assert work[name].dtype == (torch.float32 if name == "mlp.gate.weight" else torch.bfloat16), name
    buffers = dict(copied.named_buffers())
    for name, buffer in block.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def test_masks_that_blocks_share_are_one_elsewhere_too() -> None:
    mask = torch.ones(1, 1, 8, 8).expand(4, 1, 8, 8)
    moved: dict[int, Any] = {}
    first, second = (_to_device({"mask": (mask,)}, torch.device("meta"), moved)["mask"][0] for _ in range(2))
    assert first is second
    assert first.shape == mask.shape
    assert first.stride(0) == 0


def test_ratio_zero_changes_nothing() -> None:
    dense = tiny_model("llama")
    before = copy.deepcopy(dense.state_dict())
    small = prune_model(loaded(dense), planned(dense, 0.0), calibration(), config())
    after = small.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert small.trace == ()


@pytest.mark.parametrize(("dtype", "save"), [(torch.bfloat16, "auto"), (torch.float32, "bfloat16")])
def test_stored_precision_is_kept_while_forward_runs_in_float32(dtype: torch.dtype, save: str) -> None:
    dense = tiny_model("llama", dtype=dtype)
    plan, text = planned(dense, 0.4), calibration()
    whole = copy.deepcopy(dense)
    for parameter in whole.parameters():  # not the rotary frequencies
        parameter.data = parameter.data.to(torch.bfloat16).float()
    reference = prune_model(loaded(whole), plan, text, config())
    small = prune_model(loaded(dense), plan, text, config(save_dtype=save))
    assert {p.dtype for p in small.model.parameters()} == {torch.bfloat16}
    # Block 0 sees the same inputs whatever the others are rounded to: same choice, same weights but for rounding.
    assert kept_of(small.trace[0], plan.dense[0]) == kept_of(reference.trace[0], plan.dense[0])
    ours, theirs = (m.model.model.layers[0].mlp.down_proj.weight.float() for m in (small, reference))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_same_inputs_give_the_same_bits() -> None:
    made = []
    for _ in range(2):
        dense = tiny_model("qwen2")
        made.append(prune_model(loaded(dense), planned(dense, 0.4), calibration(), config()).model.state_dict())
    assert all(torch.equal(made[0][n], made[1][n]) for n in made[0])


class _KilledError(Exception):
    pass


class _DyingSink(DirectorySink):
    def save(self, index: int, block: Any, trace: BlockTrace) -> None:
        super().save(index, block, trace)
        if index == 1:
            raise _KilledError


def test_resume_after_a_kill_gives_the_same_bits(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    plan, text, architecture = planned(dense, 0.4), calibration(), architecture_of(dense.config, "tiny")
    whole = prune_model(loaded(copy.deepcopy(dense)), plan, text, config())

    dying = _DyingSink(tmp_path / "work", architecture, {"ratio": 0.4}, resume=False)
    with pytest.raises(_KilledError):
        prune_model(loaded(copy.deepcopy(dense)), plan, text, config(), sink=dying)
    sink = DirectorySink(tmp_path / "work", architecture, {"ratio": 0.4}, resume=True)
    assert sink.finished() == 2
    resumed = prune_model(loaded(copy.deepcopy(dense)), plan, text, config(), sink=sink)

    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert [kept_of(t, plan.dense[t.block]) for t in whole.trace] == [
        kept_of(t, plan.dense[t.block]) for t in resumed.trace
    ]


def test_resume_with_something_else_is_refused(tmp_path: Path) -> None:
    architecture = architecture_of(tiny_model("llama").config, "tiny")
    DirectorySink(tmp_path / "work", architecture, {"ratio": 0.4, "seed": 0}, resume=False)
    with pytest.raises(BadInputError, match=r"ratio = 0\.4, this one has 0\.5"):
        DirectorySink(tmp_path / "work", architecture, {"ratio": 0.5, "seed": 0}, resume=True)


def test_half_a_block_does_not_count_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    architecture = architecture_of(dense.config, "tiny")
    sink = DirectorySink(tmp_path / "work", architecture, {}, resume=False)
    prune_model(loaded(copy.deepcopy(dense)), planned(dense, 0.4), calibration(), config(), sink=sink)
    assert sink.finished() == 3
    (tmp_path / "work" / "001.json").unlink()
    assert sink.finished() == 1
    data = bytearray((tmp_path / "work" / "000.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "work" / "000.safetensors").write_bytes(bytes(data))
    with pytest.raises(BadInputError, match="does not match its hash"):
        prune_model(loaded(dense), planned(dense, 0.4), calibration(), config(), sink=sink)


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["host", "file"])
def test_cuda_with_hidden_states_elsewhere_gives_the_same_bits(place: Any, tmp_path: Path) -> None:
    """From a directory, so that blocks come through page-locked memory."""
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    plan, made = planned(dense, 0.4), []
    device = torch.device("cuda")
    for room in (Room(Keeper("device", device)), Room(Keeper(place, device, tmp_path))):
        settings = RunConfig(model=str(tmp_path / "model"), device="cuda", curvature_tokens=128, refit=0.1)
        of = load_model(settings, streamed=True)
        sink = DirectorySink(tmp_path / f"work{len(made)}", of.architecture, {}, resume=False)
        prune_model(of, plan, calibration(), settings, sink=sink, room=room)
        made.append(
            [(tmp_path / f"work{len(made)}" / f"{i:03d}.safetensors").read_bytes() for i in range(len(plan.blocks))]
        )
    assert made[0] == made[1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_prunes_like_the_cpu(dtype: str) -> None:
    dense = tiny_model("llama")
    plan, text = planned(dense, 0.4), calibration()
    # Unweighted: a token that is drawn differently where logits are rounded to bfloat16 would change what is chosen.
    cpu = prune_model(loaded(copy.deepcopy(dense)), plan, text, config(curvature_tokens=0))
    on_cuda = config(curvature_tokens=0).model_copy(update={"device": "cuda", "dtype": dtype})
    gpu = prune_model(loaded(copy.deepcopy(dense)), plan, text, on_cuda)
    assert kept_of(cpu.trace[0], plan.dense[0]).query_heads == kept_of(gpu.trace[0], plan.dense[0]).query_heads
    if dtype == "float32":
        torch.testing.assert_close(logits(cpu.model), logits(gpu.model), rtol=1e-3, atol=1e-2)
