"""The plan of a run: from sizes alone, or from costs that are measured and plans that are tried."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.artifacts import CalibrationSet, CostTable, PruningPlan, from_dict, read_json, to_dict, write_json
from slimexport.config import RunConfig
from slimexport.errors import BadInputError
from slimexport.progress import Progress
from slimexport.ranks import ALONE, Message, Ranks
from slimexport.run_directory import COSTS, WORK

if TYPE_CHECKING:
    from slimexport.loading import LoadedModel
    from slimexport.pruning.allocation import SearchSettings
    from slimexport.pruning.curvature import BlockCurvature
    from slimexport.pruning.states import Room


def plan_stage(
    config: RunConfig,
    architecture: Any,
    stored_dtype: str,
    costs: CostTable | None = None,
    search: SearchSettings | None = None,
) -> PruningPlan:
    """The plan; for an allocation that needs costs and has none yet, or searches and cannot, the one that comes nearest
    without, which shows what is possible."""
    from slimexport.pruning import allocation as allocations
    from slimexport.pruning.criteria import registry as criteria
    from slimexport.pruning.planner import make_plan

    criteria.get(config.criterion)
    name = config.resolved_allocation
    chosen = allocations.registry.get(name)
    if costs is None and allocations.needs_costs(chosen):
        name = "uniform" if config.resolved_layout == "uniform" else "incremental"
    elif search is None and allocations.searches(chosen):
        name = "sensitivity"
    unread = unread_options(config)
    given = name == "explicit" and "ratio" not in config.model_fields_set
    made = make_plan(
        architecture,
        ratio=None if given else config.ratio,
        criterion=config.criterion,
        allocation=name,
        layout=config.resolved_layout,
        round_to=config.round_to,
        first_ratio=config.first_ratio,
        head_weight=config.head_weight,
        stored_dtype=stored_dtype,
        table=config.sizes,
        costs=costs,
        search=search,
    )
    return dataclasses.replace(made, notes=(*made.notes, *unread)) if unread else made


def unread_options(config: RunConfig) -> list[str]:
    """A note for every option that was changed and that neither the allocation nor the criterion looks at."""
    rising = ("incremental", "arithmetic")
    readers: dict[str, tuple[str, ...]] = {
        "first_ratio": rising,
        "head_weight": (*rising, "uniform"),
        "costs": ("sensitivity", "search"),
        "probe_tokens": ("sensitivity", "search"),
        "search_seconds": ("search",),
        "search_evaluations": ("search",),
    }
    asked = config.resolved_allocation
    notes = [
        f"{name} is not used by allocation {asked}"
        for name, users in readers.items()
        if getattr(config, name) != type(config).model_fields[name].default and asked in _OURS and asked not in users
    ]
    if config.bias_compensation == "on" and config.criterion == "slimgpt":
        notes.append("bias_compensation is not used by criterion slimgpt")
    if config.curvature_tokens:  # only then, as the answer needs torch
        from slimexport.pruning.stage import weighs_errors

        if not weighs_errors(config):
            notes.append(f"curvature_tokens is not used by criterion {config.criterion}")
    return notes


_OURS = ("uniform", "incremental", "arithmetic", "explicit", "sensitivity", "search")


def known_costs(path: Path | None, identity: dict[str, str]) -> CostTable | None:
    """The table in `path`, if there is one. Raises BadInputError where it was measured on something else."""
    if path is None:
        return None
    if path.expanduser().is_dir():
        raise BadInputError(f"{path} is a directory: --costs is a file.")
    if not path.expanduser().exists():
        parent = path.expanduser().absolute().parent
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            raise BadInputError(f"The costs cannot be kept in {path}: {parent} is no directory that can be written to.")
        return None
    table = from_dict(CostTable, read_json(path.expanduser()), str(path))
    for name, value in identity.items():
        if table.identity.get(name) != value:
            raise BadInputError(
                f"{path}: these costs were measured with {name} = {table.identity.get(name)!r}, "
                f"this run has {value!r}: name another file to measure them anew."
            )
    return table


def measured_costs(
    loaded: LoadedModel,
    calibration: CalibrationSet,
    config: RunConfig,
    place: Path | None,
    progress: Progress,
    curvature: Sequence[BlockCurvature] | None = None,
    supernet: Path | None = None,
    room: Room | None = None,
    ranks: Ranks = ALONE,
) -> CostTable:
    """The costs in `config.costs` or `place`, else measured now and kept in both; `supernet` is made in the same pass,
    where it is wanted and not there yet. Of several `ranks` this is the first one."""
    from slimexport.pruning.stage import cost_identity, measure_model
    from slimexport.pruning.states import Room
    from slimexport.pruning.supernet import read_grids

    identity = cost_identity(loaded.source.fingerprint, config, calibration.source.sha256)
    table = known_costs(config.costs, identity)
    if table is None and place is not None:
        try:
            table = known_costs(place, identity)
        except BadInputError:
            table = None  # of an earlier run in this directory, with other options
    missing = supernet is not None and read_grids(supernet, identity) is None
    known = table is not None and not missing
    ranks.told(lambda: Message({"measure": not known}))
    if table is None or missing:
        with progress.stage("measure"):
            measured = measure_model(
                loaded, calibration, config,
                curvature=curvature, supernet=supernet, room=room or Room(), ranks=ranks, progress=progress.update,
            )  # fmt: skip
        table = table or measured
    if config.costs is not None and not config.costs.expanduser().exists():
        write_json(config.costs.expanduser(), to_dict(table))
    if place is not None:
        write_json(place, to_dict(table))
    return table


def measured_plan(
    directory: Path,
    loaded: LoadedModel,
    calibration: CalibrationSet,
    config: RunConfig,
    progress: Progress,
    curvature: Sequence[BlockCurvature] | None = None,
    room: Room | None = None,
    ranks: Ranks = ALONE,
) -> PruningPlan:
    """The plan of an allocation that needs costs, and, where it does so, searches with them. Of several `ranks` this is
    the first one, the others `assist_planning`.

    Costs, supernet and the state of the search are kept in `directory` and taken from there where they fit.
    """
    from slimexport.pruning import allocation as allocations
    from slimexport.pruning.stage import cost_identity, save_dtype_of, search_settings
    from slimexport.pruning.supernet import read_grids

    stored = save_dtype_of(config, loaded)
    if not allocations.searches(allocations.registry.get(config.resolved_allocation)):
        costs = measured_costs(
            loaded, calibration, config, directory / COSTS, progress, curvature, room=room, ranks=ranks
        )
        return plan_stage(config, loaded.architecture, stored, costs)
    supernet, state = directory / WORK / "supernet", directory / WORK / "search.json"
    identity = cost_identity(loaded.source.fingerprint, config, calibration.source.sha256)
    shared = read_grids(supernet, identity) is None  # one of an earlier run is on this rank's disk alone
    costs = measured_costs(
        loaded, calibration, config, directory / COSTS, progress, curvature, supernet, room=room, ranks=ranks
    )  # fmt: skip
    ranks.told(lambda: Message({"share": shared}))
    with progress.stage("search"):
        search = search_settings(
            loaded, calibration, config,
            supernet=supernet, state=state, ranks=ranks if shared else ALONE, progress=progress.update,
        )  # fmt: skip
        made = plan_stage(config, loaded.architecture, stored, costs, search)
        search.end()
        return made


def assist_planning(
    loaded: LoadedModel, calibration: CalibrationSet, config: RunConfig, room: Room, ranks: Ranks
) -> None:
    """`measured_plan` on a rank that is not the first: candidates and plans are dealt out to all."""
    from slimexport.pruning import allocation as allocations
    from slimexport.pruning.stage import measure_model, supernet_of

    measures = ranks.told(Message).values["measure"]
    with tempfile.TemporaryDirectory() as scratch:
        searches = allocations.searches(allocations.registry.get(config.resolved_allocation))
        supernet = Path(scratch, "supernet") if searches else None
        if measures:
            measure_model(loaded, calibration, config, supernet=supernet, room=room, ranks=ranks)
        if supernet is not None and ranks.told(Message).values["share"]:
            supernet_of(loaded, calibration, config, supernet, ranks).assist()
