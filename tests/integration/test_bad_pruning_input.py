"""Bad input to allocations and criteria through the real command line: one line, the exit code, nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import tiny_directory, tiny_text
from test_bad_input import Result, cli, good, model, prune, refused, text  # noqa: F401

QUICK = {"ratio": 0.4, "round_to": 8, "probe_tokens": 64}
UNPROBED = {"ratio": 0.4, "round_to": 8}  # where nothing is probed


@pytest.fixture
def table(tmp_path: Path) -> Callable[[str], Path]:
    def write(content: str) -> Path:
        path = tmp_path / "sizes.yaml"
        path.write_text(content, encoding="utf-8")
        return path

    return write


SIZES = "{kv_groups: 2, heads_per_group: 2, channels: 40}"


@pytest.mark.parametrize(
    ("content", "flags", "expected"),
    [
        (f"0: {SIZES}\n2: {SIZES}\n", {}, ["block 1 is missing"]),
        (f'"*": {SIZES}\n1: {{kv_groups: 4, heads_per_group: 2, channels: 40}}\n', {}, ["block 1", "kv_groups 4"]),
        ('"*": {kv_groups: 2, heads_per_group: 2, channels: 41}\n', {"round_to": 8}, ["channels 41", "--round-to"]),
        (f'"*": {SIZES}\n', {"ratio": 0.9}, ["0.9"]),
        (f'"*": {SIZES}\n', {"ratio": 0.3}, ["leave out --ratio"]),
        ("[1, 2\n", {}, ["YAML"]),
    ],
)
def test_explicit_sizes(
    prune: Callable[..., Result],  # noqa: F811
    model: Path,  # noqa: F811
    table: Callable[[str], Path],
    content: str,
    flags: dict[str, Any],
    expected: list[str],
) -> None:
    refused(prune(model, sizes=table(content), **{"round_to": 8, **flags}), *expected)


def test_sizes_that_nobody_reads(
    prune: Callable[..., Result],  # noqa: F811
    model: Path,  # noqa: F811
    table: Callable[[str], Path],
) -> None:
    result = prune(model, sizes=table(f'"*": {SIZES}\n'), allocation="incremental")
    refused(result, "sizes", "does not read", code=4)


def test_search_budget_of_zero(prune: Callable[..., Result], model: Path) -> None:  # noqa: F811
    for flag in ("search_seconds", "search_evaluations"):
        refused(prune(model, allocation="search", **{flag: 0}), f"--{flag.replace('_', '-')}", code=2)


def test_criterion_whose_bias_the_family_cannot_hold(prune: Callable[..., Result], tmp_path: Path) -> None:  # noqa: F811
    mistral = tiny_directory(tmp_path / "mistral", "mistral")
    refused(prune(mistral, criterion="flap", bias_compensation="on", **QUICK), "mistral", "no bias", "o_proj")
    refused(prune(mistral, criterion="flap", bias_compensation="on", layout="uniform", **QUICK), "no bias")


@pytest.fixture
def pruned(cli: Callable[..., Result], model: Path, tmp_path: Path) -> Path:  # noqa: F811
    out = tmp_path / "finished"
    code, _, err = cli("prune", model, output=out, costs=tmp_path / "costs.json", **QUICK)
    assert code == 0, err
    return out


def test_costs_are_kept_and_used_again(cli: Callable[..., Result], model: Path, pruned: Path, tmp_path: Path) -> None:  # noqa: F811
    assert json.loads((tmp_path / "costs.json").read_text())["blocks"]
    code, out, err = cli("plan", model, "--json", **{**QUICK, "ratio": 0.3}, costs=tmp_path / "costs.json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["allocation"] == "sensitivity"
    assert abs(plan["ratio"] - 0.3) < 0.05  # the tiny model's steps are coarse
    again = tmp_path / "again"
    code, _, err = cli("prune", model, output=again, costs=tmp_path / "costs.json", **QUICK)
    assert code == 0, err
    assert "measure" not in err
    assert (again / "plan.json").read_bytes() == (pruned / "plan.json").read_bytes()
    weights = "checkpoint/model.safetensors"
    assert (again / weights).read_bytes() == (pruned / weights).read_bytes()


def test_curvature_is_measured_once_for_costs_and_pruning(
    cli: Callable[..., Result],  # noqa: F811
    model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from slimexport.pruning import stage

    measured = []
    original = stage.measure_curvature
    monkeypatch.setattr(stage, "measure_curvature", lambda **given: measured.append(1) or original(**given))
    code, _, err = cli("prune", model, output=tmp_path / "out", **QUICK)
    assert code == 0, err
    assert len(measured) == 1
    record = json.loads((tmp_path / "out" / "prune.json").read_text())
    assert record["seconds_curvature"] > 0
    assert record["seconds_allocation"] > 0
    code, _, err = cli("prune", model, output=tmp_path / "paper", curvature_tokens=0, allocation="uniform", **UNPROBED)
    assert code == 0, err
    assert len(measured) == 1


def test_costs_of_another_model_or_text(
    cli: Callable[..., Result],  # noqa: F811
    model: Path,  # noqa: F811
    pruned: Path,
    tmp_path: Path,
) -> None:
    kept = (pruned / "plan.json").read_bytes()
    other = tiny_directory(tmp_path / "other", seed=7)
    flags = {"costs": tmp_path / "costs.json", **QUICK}
    refused(cli("prune", other, output=tmp_path / "new", **flags), "costs.json", "model")
    refused(cli("prune", model, output=tmp_path / "new", **{**flags, "probe_tokens": 128}), "probe_tokens")
    assert not (tmp_path / "new").exists()
    another = tiny_text(tmp_path / "another.txt", 9000, seed=3)
    for command in ("plan", "prune"):
        where = {"output": tmp_path / "new"} if command == "prune" else {}
        refused(cli(command, model, **{**flags, **where, "calibration": another}), "measured with text")
    broken = tmp_path / "broken.json"
    broken.write_text((tmp_path / "costs.json").read_text()[:100])
    refused(cli("prune", model, output=tmp_path / "new", **{**flags, "costs": broken}), "broken.json", "truncated")
    assert (pruned / "plan.json").read_bytes() == kept


def test_force_keeps_the_plan_that_it_is_given(cli: Callable[..., Result], model: Path, pruned: Path) -> None:  # noqa: F811
    words = {k: v for k, v in QUICK.items() if k == "round_to"}
    result = cli("prune", model, "--force", output=pruned, sizes=pruned / "plan.json", **words)
    refused(result, "plan.json", "--force would replace")
    copy = shutil.copy(pruned / "plan.json", pruned.parent / "sizes.json")
    code, _, err = cli("prune", model, "--force", output=pruned, sizes=copy, **words)
    assert code == 0, err
