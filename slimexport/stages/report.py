"""Gathers what the other stages left, applies the gates, writes `report/`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slimexport.artifacts import ModelSource, PruningPlan, from_dict
from slimexport.run_directory import PLAN, PRUNE, RECOVERED, REPORT, PruneRecord, RunDirectory
from slimexport.stages.inputs import decided, earlier_exports, export_names

if TYPE_CHECKING:
    from slimexport.config import RunConfig
    from slimexport.progress import Progress
    from slimexport.reporting import PruningSummary, Report


def report_stage(directory: RunDirectory, config: RunConfig, progress: Progress) -> Report:
    from slimexport import reporting
    from slimexport.artifacts import write_text
    from slimexport.checkpoint.card import CARD, model_card
    from slimexport.targets.base import load_artifact

    verified = directory.verified()
    record = directory.read(PRUNE, PruneRecord)
    compared = earlier_exports(config, directory.state, verified.evaluation)
    found = {verified.first: verified.report, **verified.others}
    made = reporting.Report(
        source=from_dict(ModelSource, directory.state["source"], "run.json"),
        config=config.model_dump(mode="json"),
        plan=directory.read(PLAN, PruningPlan),
        checkpoint=directory.shrunk(),
        verification=verified.report,
        gates=tuple(
            result
            for name, of in found.items()
            for result in decided(config, name, of, compared, first=name == verified.first)
        ),
        others=verified.others,
        pruning=_summary(record),
        recovery=directory.recovered(),
        calibration=record.calibration,
        evaluation=verified.evaluation,
        exports={name: load_artifact(directory / name) for name in export_names(config)},
        environment=directory.state["environment"],
        seconds=directory.seconds(),
        command=_command(),
    )
    with progress.stage("report"):
        reporting.write_report(made, directory / REPORT)
        place, how = directory / made.checkpoint.path, made.recovery if made.checkpoint.path == RECOVERED else None
        if record.calibration and place.is_dir():
            card = model_card(made.source, made.plan, record.calibration, verified.report, verified.evaluation, how)
            write_text(place / CARD, card)
    return made


def _summary(record: PruneRecord) -> PruningSummary | None:
    from slimexport.reporting import PruningSummary

    if not record.trace:
        return None
    return PruningSummary.from_trace(record.trace, record.seconds_curvature, record.seconds_allocation)


def _command() -> str | None:
    """What was typed, where it was the command line."""
    import shlex
    import sys

    name = Path(sys.argv[0]).name
    return shlex.join([name, *sys.argv[1:]]) if name in ("slimexport", "optimum-cli") else None
