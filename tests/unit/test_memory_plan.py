"""Where hidden states live, what pruning needs by the plan, and what happens when a device has less than that."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_text

import slimexport
from slimexport.architectures import architecture_of
from slimexport.artifacts import PruningPlan
from slimexport.checkpoint import save
from slimexport.config import RunConfig, bytes_of
from slimexport.errors import BadInputError
from slimexport.progress import Progress
from slimexport.pruning import memory, states
from slimexport.pruning.block import Block
from slimexport.pruning.planner import make_plan
from slimexport.pruning.states import FileStates, HiddenStates, HostStates, Keeper, MemoryStates
from slimexport.stages import prune as prune_stage
from slimexport.stages.plan import plan_stage
from slimexport.testing.models import tiny_config, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
MAKERS: dict[str, Callable[[Path], HiddenStates]] = {
    "device": lambda place: MemoryStates(),
    "host": lambda place: HostStates(CPU),
    "file": lambda place: FileStates(place, CPU),
}


@pytest.mark.parametrize("where", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_put_in_comes_out(where: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 5, 3).to(dtype), torch.randn(1, 5, 3).to(dtype)]
    held = MAKERS[where](tmp_path)
    for tensor in given:
        held.append(tensor.clone())
    assert len(held) == 2
    assert all(torch.equal(held[i], tensor) and held[i].dtype == dtype for i, tensor in enumerate(given))
    for shape in ((2, 5, 2), (2, 5, 3), (4, 5, 3)):  # smaller, larger again, larger than ever
        changed = torch.randn(shape).to(dtype)
        held[0] = changed.clone()
        assert torch.equal(held[0], changed)
        assert torch.equal(held[1], given[1])
    strided = torch.randn(3, 4, 2).to(dtype).mT
    held.append(strided)
    assert torch.equal(held[-1], strided)
    with pytest.raises(IndexError):
        held[3]
    assert list(tmp_path.iterdir()) == []  # a file has no name


@pytest.mark.parametrize("where", ["host", "file"])
def test_what_is_done_to_a_copy_does_not_count(where: str, tmp_path: Path) -> None:
    held = MAKERS[where](tmp_path)
    held.append(torch.ones(1, 2, 2))
    held[0].zero_()
    assert float(held[0].sum()) == 4.0


def saved(place: Path, family: str = "llama") -> Path:
    torch.manual_seed(0)
    tiny_model(tiny_config(family)).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def options(model: Path, **more: Any) -> RunConfig:
    text = tiny_text(model.parent / "text.txt", 1500, seed=1)
    return RunConfig(
        model=str(model), calibration=str(text), calibration_tokens=512, sequence_length=32, probe_tokens=64,
        round_to=8, ratio=0.3, **more,
    )  # fmt: skip


def checkpoint(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "checkpoint").iterdir())}


class Log(Progress):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def no_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "check_round_trip", lambda *_, **__: 0.0)


@pytest.fixture(params=[False, True], ids=["streamed", "in memory"])
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Read block by block, and as a whole."""
    if request.param:
        monkeypatch.setattr(prune_stage, "block_by_block", lambda config: False)
    return saved(tmp_path / "model")


def test_with_hidden_states_in_a_file_the_bytes_are_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Re-fit, curvature and measured costs as well."""
    slimexport.prune(options(model), tmp_path / "near")
    cost = slimexport.plan(options(model)).cost
    assert cost is not None
    assert cost.hidden_states == "device"
    less = str(cost.peak_memory_bytes - 1)
    planned = slimexport.plan(options(model, max_memory=less)).cost
    assert planned is not None
    assert planned.hidden_states == "file"
    assert planned.peak_memory_bytes < cost.peak_memory_bytes
    assert planned.disk_bytes > cost.disk_bytes
    log, made = Log(), [0]

    class Counted(FileStates):
        def __init__(self, *args: Any) -> None:
            made[0] += 1
            super().__init__(*args)

    monkeypatch.setattr(states, "FileStates", Counted)
    slimexport.prune(options(model, max_memory=less), tmp_path / "far", progress=log)
    assert checkpoint(tmp_path / "near") == checkpoint(tmp_path / "far")
    assert any("hidden states live in a file" in note for note in log.notes)
    assert made[0] > 10


def test_pinned_memory_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path / "model")
    slimexport.prune(options(model), tmp_path / "near")
    real = memory.fitting
    monkeypatch.setattr(
        memory, "fitting", lambda *args, **more: dataclasses.replace(real(*args, **more), place="host")
    )  # fmt: skip
    slimexport.prune(options(model), tmp_path / "host")
    assert checkpoint(tmp_path / "near") == checkpoint(tmp_path / "host")


def test_limits_that_cannot_be_kept_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    limited = options(model, max_memory="100MB")
    for call in (lambda: slimexport.plan(limited), lambda: slimexport.prune(limited, tmp_path / "out")):
        with pytest.raises(BadInputError, match=r"needs 0\.6\d GB .*--max-memory 0\.10 GB cannot be kept"):
            call()
    assert not (tmp_path / "out" / "checkpoint").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("6GB", 6 * 10**9), ("5.5 GiB", int(5.5 * 2**30)), ("4096m", 4096 * 10**6), ("123", 123), ("1kib", 1024)],
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert bytes_of(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1GB", "6XB", "0", "1e9"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ValueError, match="no amount of memory"):
        bytes_of(text)


def of_seven_billion() -> tuple[PruningPlan, Any]:
    config = tiny_config("llama")
    config.update({
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
        "head_dim": 128, "vocab_size": 32000, "num_hidden_layers": 32, "tie_word_embeddings": False,
    })  # fmt: skip
    architecture = architecture_of(config, "7B")
    plan = make_plan(architecture, ratio=0.25, criterion="slimgpt", allocation="incremental", layout="per_layer",
                     round_to=32, stored_dtype="bfloat16")  # fmt: skip
    return plan, architecture


def test_a_smaller_device_has_the_states_on_the_host_and_a_smaller_host_in_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The Done-when of the issue: 7 B on 128 x 2048 tokens within 24 GiB of device memory."""
    plan, architecture = of_seven_billion()
    monkeypatch.setattr(memory, "free_bytes", lambda device: (64 * 10**9, 140 * 10**9))
    cuda = torch.device("cuda")

    def fits(**limits: str) -> memory.Needs:
        config = RunConfig(model="7B", fast=True, calibration_tokens=2**18, sequence_length=2048, **limits)
        return memory.fitting(plan, architecture, config, cuda, streamed=True)

    near = fits()
    assert near.place == "device"
    assert 8 * 10**9 < near.device < 24 * 2**30
    host = fits(max_device_memory=str(near.device - 1))
    assert host.place == "host"
    assert near.device - host.device > 3 * 10**9  # 2^18 tokens of two bytes, as states and as inputs of the heads
    assert host.host - near.host > 3 * 10**9
    file = fits(max_device_memory=str(near.device - 1), max_memory=str(host.host - 1))
    assert file.place == "file"
    assert (file.device, file.host) == (host.device, near.host)
    with pytest.raises(BadInputError, match=r"device memory even with hidden states off the device"):
        fits(max_device_memory="1GB")


def test_where_nothing_fits_the_least_is_taken_and_a_limit_alone_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, architecture = of_seven_billion()
    monkeypatch.setattr(memory, "free_bytes", lambda device: (10**9, 10**9))
    config = RunConfig(model="7B", fast=True, calibration_tokens=2**18, sequence_length=2048)
    assert memory.fitting(plan, architecture, config, torch.device("cuda"), streamed=True).place == "file"
    assert memory.fitting(plan, architecture, config, CPU, streamed=True).place == "file"


def test_gradients_are_counted() -> None:
    """Their sums stay on the host; while they are made, the whole model is on the device, and gradients as large."""
    config = tiny_config("llama")
    architecture = architecture_of(config, "tiny")
    model = tiny_model(config)
    blocks, all_of_it = (sum(p.numel() for p in of.parameters()) for of in (model.model.layers, model))

    def counted(criterion: str, device: str) -> tuple[memory.Needs, tuple[int, int]]:
        given = RunConfig(model="x", ratio=0.3, criterion=criterion, calibration_tokens=512, sequence_length=32)
        plan = plan_stage(given, architecture, "float32")
        where = torch.device(device)
        found = memory.needs(plan, architecture, given, where, "device", streamed=False)
        return found, memory._measuring_gradients(plan, architecture, given, 4, where)

    none, taylor, lora = (counted(criterion, "cuda") for criterion in ("magnitude", "taylor", "taylor_lora"))
    assert none[1] == (0, 0)
    assert (taylor[1][0], lora[1][0]) == (4 * blocks, 0)
    assert taylor[1][1] - lora[1][1] == 4 * blocks
    assert lora[1][1] > 4 * all_of_it
    assert taylor[0].host == lora[0].host + 4 * blocks
    assert counted("taylor", "cpu")[1][1] == taylor[1][1] - 4 * all_of_it  # it is where it was


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"criterion": "taylor"}, "criterion taylor needs the model as a whole"),
        ({"calibration": "self"}, "a model that writes text to calibrate on is needed as a whole"),
        ({}, "this model cannot be read block by block"),
    ],
)
def test_what_stands_against_less_memory_is_said(more: dict[str, Any], why: str) -> None:
    config = tiny_config("llama")
    architecture = architecture_of(config, "tiny")
    given = RunConfig(model="x", ratio=0.3, calibration_tokens=512, sequence_length=32, max_memory="1MB", **more)
    plan = plan_stage(given, architecture, "float32")
    with pytest.raises(BadInputError, match=why):
        memory.fitting(plan, architecture, given, CPU, streamed=False)


class Full:
    """A device that runs out of memory at block 1, so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int):
        self.left, real = times, Block._prune_channels

        def prune(block: Block, attention: Any) -> Any:
            if block.index == 1 and self.left:
                self.left -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
            return real(block, attention)

        monkeypatch.setattr(Block, "_prune_channels", prune)


def test_a_device_that_runs_out_of_memory_is_given_less_at_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the heads of block 1 have gone already."""
    slimexport.prune(options(model), tmp_path / "near")
    log, full = Log(), Full(monkeypatch, 2)
    slimexport.prune(options(model), tmp_path / "full", progress=log)
    assert full.left == 0
    assert [note for note in log.notes if "ran out of memory" in note] == [
        f"cpu ran out of memory: going on with {tokens} tokens in a forward call" for tokens in (2048, 1024)
    ]
    assert checkpoint(tmp_path / "near") == checkpoint(tmp_path / "full")  # 512 tokens are one batch in each case


def test_a_device_that_is_too_small_is_said_and_resumed_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tmp_path / "model")
    slimexport.prune(options(model), tmp_path / "near")
    with monkeypatch.context() as patch:
        Full(patch, 99)
        with pytest.raises(BadInputError, match=r"cpu ran out of memory \(CUDA out of memory\), with 512 tokens"):
            slimexport.prune(options(model), tmp_path / "full")
    slimexport.prune(options(model), tmp_path / "full", resume=True)
    assert checkpoint(tmp_path / "near") == checkpoint(tmp_path / "full")


def test_a_full_disk_under_the_states_is_told_by_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        Keeper("file", CPU, tmp_path)([torch.ones(2)])


def test_eager_attention_and_the_fit_of_projections_are_counted() -> None:
    """The first is 12 bytes for every pair of positions and head; the second was half of a default run's peak."""
    plan, architecture = of_seven_billion()

    def took(**more: Any) -> int:
        config = RunConfig(model="7B", calibration_tokens=2**14, sequence_length=2048, allocation="incremental", **more)
        return memory.needs(plan, architecture, config, CPU, "device", streamed=True).host

    eager = dataclasses.replace(architecture, family=dataclasses.replace(architecture.family, eager=True))
    fast = RunConfig(model="7B", calibration_tokens=2**14, sequence_length=2048, fast=True)
    more = memory._batch(plan, eager, 4096, 4, 2048) - memory._batch(plan, architecture, 4096, 4, 2048)
    assert more == 4096 * (12 * 32 * 2048 - 4 * 3 * 11008)
    assert memory.needs(plan, eager, fast, CPU, "device", streamed=True).host > took(fast=True)
    kept = max(block.channels for block in plan.blocks)
    assert took(refit=0.1) - took(fast=True) > 2 * (21 * kept**2 + 54 * kept * 4096) - 20 * 11008**2


def test_files_in_the_cache_of_a_container_are_no_memory_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimexport.machine import memory as machine

    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2900000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\ninactive_file 1500000\nactive_file 500000\n")
    assert machine.available() == 3_000_000 - (2_900_000 - 2_000_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available() > 3_000_000
