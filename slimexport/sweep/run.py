"""Runs the points of a sweep. A point that fails does not stop the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from slimexport.artifacts import SCHEMA_VERSION, check_identity, read_json, remove, write_json
from slimexport.config import RunConfig
from slimexport.errors import BadInputError, ExitCode, SlimExportError, first_sentence
from slimexport.progress import Progress
from slimexport.run_directory import LOCK, REPORT, RunDirectory, holds, lock_file
from slimexport.stages.inputs import absolute, check_targets, exports, input_paths
from slimexport.sweep.points import REPORTS, Point, Sweep, checked_ratios, config_of, measured, run_name

if TYPE_CHECKING:
    from slimexport.reporting import Report

STATE = "sweep.json"


def sweep(
    config: RunConfig,
    ratios: Sequence[float],
    output: Path,
    *,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """One run for each of `ratios`, in all of the config's targets and precisions, in `output`/ratio-R.

    Where the config leaves the device to us and there are several GPUs, each runs one point at a time; else they
    follow each other. Raises SlimExportError for what no point could survive.
    """
    from slimexport.loading import fingerprint, locate
    from slimexport.pruning import allocation

    progress = progress or Progress(quiet=True)
    ratios, config, output = checked_ratios(ratios), absolute(config), Path(output)
    check_targets(config)
    identity = {
        "config": json.loads(config.model_copy(update={"ratio": 0.0}).model_dump_json()),
        "fingerprint": fingerprint(locate(config)),
    }
    _check_free(output, identity, force=force, resume=resume)
    if force:
        RunDirectory(output).check_holds_none(input_paths(config))
    output.mkdir(parents=True, exist_ok=True)
    with lock_file(output / LOCK, f"{output} is in use by another sweep of slimexport."):
        if force:
            for path in [*output.glob("ratio-*"), output / "costs.json", output / "baselines", output / STATE]:
                remove(path)
        for name in REPORTS:  # of the sweep as it was
            remove(output / name)
        write_json(output / STATE, {"schema_version": SCHEMA_VERSION, "identity": identity, "ratios": list(ratios)})
        measures = allocation.needs_costs(allocation.registry.get(config.resolved_allocation))
        runs = {ratio: config_of(config, ratio, output, measures) for ratio in ratios}
        devices = _devices(config)
        # The first measures the costs and exports the dense model for all.
        first, *others = ratios[::-1]
        made = {first: _one(runs[first], output, progress, None)}
        _pin(made, progress)
        if len(devices) > 1 and others:
            made |= _in_parallel({ratio: runs[ratio] for ratio in others}, output, progress, devices)
        else:
            for ratio in others:
                made[ratio] = _one(runs[ratio], output, progress, None)
                _pin(made, progress)
    points = tuple(point for ratio in ratios for point in made[ratio][0])
    configs = {ratio: config.model_copy(update={"ratio": ratio}) for ratio in ratios}
    return Sweep(points, configs, {ratio: made[ratio][1] for ratio in ratios}, config.model)


def _check_free(output: Path, identity: Mapping[str, Any], *, force: bool, resume: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise BadInputError(f"{output} is a file; the output must be a directory.")
    if holds(output, STATE, "sweep", force=force, resume=resume) and resume:
        state = read_json(output / STATE)
        check_identity(state.get("identity", {}) if isinstance(state, dict) else {}, identity, output)


def _devices(config: RunConfig) -> list[str]:
    """Where points can run beside each other: of several GPUs what CUDA_VISIBLE_DEVICES calls each of ours."""
    if config.device not in ("auto", "cuda"):
        return [config.device]
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [name.strip() for name in ours.split(",")] if ours else [str(index) for index in range(count)]
    return named[:count] or ["cpu"]


Outcome = tuple[list[Point], int]
"""The points of one run, and its exit code."""


def _one(config: RunConfig, output: Path, progress: Progress, report: Report | None) -> Outcome:
    from slimexport import pipeline

    place = output / run_name(config.ratio)
    progress.note(f"ratio {config.ratio:g}: {place}")
    try:
        made = report or pipeline.run(config, place, resume=place.exists(), progress=progress)
    except (SlimExportError, OSError) as error:
        code = error.exit_code if isinstance(error, SlimExportError) else ExitCode.BAD_INPUT
        return _failed(config, place, str(error), int(code), progress)
    except Exception as error:  # a crash is one point's, as it is in a process of its own
        why = f"internal error: {type(error).__name__}: {first_sentence(error)}"
        return _failed(config, place, why, int(ExitCode.INTERNAL), progress)
    points = [measured(point, made.each[point.export]) for point in _empty(config, place)]
    for point in points:
        progress.note("  ".join([point.name, *(f"{name} {value:.4g}" for name, value in point.values.items())]))
    return points, int(ExitCode.PASSED if made.passed else ExitCode.GATE_FAILED)


def _failed(config: RunConfig, place: Path, why: str, code: int, progress: Progress) -> Outcome:
    progress.note(f"ratio {config.ratio:g} failed: {why}")
    return [replace(point, failed=why) for point in _empty(config, place)], code


def _pin(made: Mapping[float, Outcome], progress: Progress) -> None:
    """The table so far, above the bar of what runs."""
    from slimexport.reporting import terminal
    from slimexport.sweep import report

    points = [point for _, (of, _) in sorted(made.items()) for point in of]
    progress.pin(terminal.table(report.heads(points), report.rows(points)))


def _empty(config: RunConfig, place: Path) -> list[Point]:
    return [Point(config.ratio, name, target, precision, place.name)
            for name, (target, precision) in exports(config).items()]  # fmt: skip


def _in_parallel(
    runs: Mapping[float, RunConfig], output: Path, progress: Progress, devices: Sequence[str]
) -> dict[float, Outcome]:
    """A process for each run, one at a time on each device: no CUDA context is shared, and a crash is one point's."""
    free: SimpleQueue[str] = SimpleQueue()
    for device in devices:
        free.put(device)

    def in_process(config: RunConfig) -> Outcome:
        from slimexport.reporting import load_report

        device = free.get()
        place = output / run_name(config.ratio)
        try:
            recipe = output / f".{place.name}.json"
            write_json(recipe, json.loads(config.model_dump_json()))
            command = [sys.executable, "-m", "slimexport.cli", "run", "--recipe", str(recipe), "-o", str(place)]
            command += ["--quiet"]
            command += ["--resume"] if place.exists() else []
            visible = {"CUDA_VISIBLE_DEVICES": device}
            done = subprocess.run(command, env={**os.environ, **visible}, capture_output=True, text=True, check=False)
            remove(recipe)
        finally:
            free.put(device)
        if done.returncode in (ExitCode.PASSED, ExitCode.GATE_FAILED):
            return _one(config, output, progress, load_report(place / REPORT))
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].removeprefix("Error: ")
        code = done.returncode if done.returncode > 0 else ExitCode.INTERNAL  # below 0 it was killed
        return _failed(config, place, why, code, progress)

    with ThreadPoolExecutor(len(devices)) as pool:
        return dict(zip(runs, pool.map(in_process, runs.values()), strict=True))
