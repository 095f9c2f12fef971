"""What the stages share: the config they go by, which of its fields decide what, and files that must be unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.artifacts import is_quantised, sha256_file
from slimexport.config import RunConfig, layered
from slimexport.errors import BadInputError
from slimexport.gates.declared import over
from slimexport.loading import BUILTIN
from slimexport.options import STAGES
from slimexport.run_directory import BASELINE, RunDirectory
from slimexport.tasks import named as task_names
from slimexport.texts import mix, sources

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from slimexport.architectures.base import Architecture
    from slimexport.artifacts import TextPart, TextSource, VerificationReport
    from slimexport.gates.decide import Earlier, GateResult
    from slimexport.loading import LoadedModel
    from slimexport.targets.base import ExportOptions

ANEW = "slimexport run or prune, with --force, starts over"


class Overrides(dict[str, Any]):
    """What a command changes of a run's settings: `recipe`'s, which stand in the file `where`, and the `flags` over it.

    Of a plain dict all count as flags.
    """

    def __init__(self, recipe: Mapping[str, Any], flags: Mapping[str, Any], where: str):
        super().__init__(over(recipe, flags))
        self.recipe, self.flags, self.where = dict(recipe), dict(flags), where


def config_of(directory: RunDirectory, overrides: dict[str, Any] | None) -> RunConfig:
    """What the run was made with, and what this command changes."""
    changes = overrides if isinstance(overrides, Overrides) else Overrides({}, overrides or {}, "options")
    below = over(directory.state.get("config", {}), changes.recipe)
    return absolute(layered(below, changes.flags, changes.where))


def absolute(config: RunConfig) -> RunConfig:
    """Paths that exist become absolute: later stages may be called from another directory. Names of ours stay names."""
    found = {
        name: str(Path(value).expanduser().resolve())
        for name in ("model", "calibration", "eval_text", "recover_text")
        if (value := getattr(config, name)) not in (*BUILTIN, "default", *sources.NAMES)
        and not mix.is_mix(value)
        and Path(value).expanduser().exists()
    }
    for name in ("calibration", "recover_text"):
        if mix.is_mix(getattr(config, name)):
            found[name] = mix.absolute(getattr(config, name))
    for name in ("sizes", "costs", "against"):
        if value := getattr(config, name):
            found[name] = value.expanduser().resolve()
    if config.baseline_cache:
        found["baseline_cache"] = config.baseline_cache.expanduser().resolve()  # type: ignore[assignment]
    tasks = [task_names.parse(spec) for spec in config.tasks]
    found["tasks"] = tuple(str(replace(t, file=t.file.resolve()) if t.file else t) for t in tasks)  # type: ignore[assignment]
    return config.model_copy(update=found)


def earlier_exports(
    config: RunConfig, state: Mapping[str, Any], text: TextSource, *, needed: bool = True
) -> Mapping[str, Earlier]:
    """What gates compare the exports with, by name. `state` is run.json's.

    Empty without `config.against`, and where that is gone and is not `needed`, or no gate compares with it. Raises
    BadInputError where it is no report, or of another model.
    """
    from slimexport.gates import earlier

    if config.against is None:
        return {}
    needed = needed and any(gate.of == "earlier" for gate in config.all_gates())
    if not needed and not config.against.exists():
        return {}
    report = earlier.read_of(config.against, state["source"]["fingerprint"])
    return earlier.comparisons(report, tuple(exports(config)), state["environment"], text, config.eval_window)


def decided(
    config: RunConfig,
    name: str,
    report: VerificationReport,
    compared: Mapping[str, Earlier],
    first: bool,
) -> tuple[GateResult, ...]:
    """The config's gates on the export `name`; the report is about the `first` one, and names the others."""
    from slimexport.gates import decide, earlier

    return decide.evaluate(
        config.all_gates(),
        report,
        "" if first else name,
        earlier=earlier.of_export(name, compared) if config.against else None,
        undecided_fails=config.on_undecided == "fail",
        looks=looks(config.latency_runs, config.max_latency_runs),
    )


def looks(runs: int, at_most: int) -> int:
    """How often a gate on a time is looked at, where each time all runs so far are measured once more."""
    return 1 + sum(1 for doublings in range(1, 32) if runs and runs << (doublings - 1) < at_most)


def check_targets(config: RunConfig) -> None:
    """Unknown targets and absent providers are said before minutes of pruning."""
    from slimexport.machine.cores import checked_threads
    from slimexport.recovery.methods import registry as methods
    from slimexport.runtime import require_provider
    from slimexport.targets import registry as targets

    if config.recover != "none":
        methods.get(config.recover)
    require_provider(config.provider)
    task_names.check(config.tasks)
    checked_threads(config.threads)
    for name in config.target:
        for precision in config.precision:
            targets.get(name).check_options(export_options(config, precision))
    for what, named in (("target", config.target), ("precision", config.precision)):
        if len(set(named)) < len(named):
            raise BadInputError(f"A {what} is named twice: {', '.join(named)}.")
    if config.baseline_cache and config.baseline_cache.exists() and not config.baseline_cache.is_dir():
        raise BadInputError(f"The baseline cache {config.baseline_cache} is not a directory.")


def check_possible(
    model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, architecture: Architecture, config: RunConfig
) -> None:
    """That a model or a tokenizer like these cannot be trained, or exported to a target, is said before minutes of
    pruning."""
    from slimexport.recovery import optimisers
    from slimexport.recovery.methods import registry as methods
    from slimexport.targets import registry as targets
    from slimexport.targets.base import ChecksTokenizer

    if config.recover != "none":
        methods.get(config.recover).check(architecture)
        optimisers.check(config.recover_optimizer)
    for name in config.target:
        target = targets.get(name)
        for precision in config.precision:
            target.check_model(model_config, architecture, export_options(config, precision))
        if isinstance(target, ChecksTokenizer):
            target.check_tokenizer(tokenizer, architecture.vocab)


def fields_of(config: RunConfig, *stages: str) -> dict[str, Any]:
    """The part of the config that decides the results of `stages`."""
    data = config.model_dump(mode="json")
    names = [name for stage in stages for name in STAGES[stage] if name != "baseline_cache"]
    return {name: data[name] for name in names}


def exports(config: RunConfig) -> dict[str, tuple[str, str]]:
    """The exported directories of a run -> target and precision; the first is the one that the report is about."""
    each = [(target, precision) for target in config.target for precision in config.precision]
    return {target if precision == "fp32" else f"{target}-{precision}": (target, precision)
            for target, precision in each}  # fmt: skip


def baselines(config: RunConfig) -> dict[str, tuple[str, str]]:
    """The dense model's exports. Where all others are quantised there is one in fp32 as well: accuracy is held to it,
    or what rounding costs would be seen nowhere. None where verification is light: nothing is timed beside it."""
    if not config.baseline or config.verify == "light":
        return {}
    each = exports(config)
    each.setdefault(reference(config), (config.target[0], "fp32"))
    return each


def reference(config: RunConfig) -> str:
    """Of `baselines` the name of the one that accuracy is held to: the first that is not quantised."""
    names = (name for name, (_, precision) in exports(config).items() if not is_quantised(precision))
    return next(names, config.target[0])


def export_names(config: RunConfig) -> list[str]:
    """`exports`, and `baselines`."""
    return [*exports(config), *(f"{BASELINE}/{name}" for name in baselines(config))]


def export_options(config: RunConfig, precision: str) -> ExportOptions:
    """Raises BadInputError for a precision that the provider does not compute in."""
    from slimexport.targets.base import ExportOptions

    return ExportOptions(
        config.exporter, precision, config.provider, config.without_pass, config.resolved_layout == "per_layer"
    )


def input_paths(config: RunConfig) -> list[Path]:
    """Of all that is read, which no output may replace."""
    texts = (config.calibration, config.eval_text, config.recover_text)
    files = [*(file for spec in texts for file in mix.files(spec)), config.sizes, config.costs, config.against]
    named = [Path(name).expanduser() for name in (config.model, *texts)]  # or something that is no path
    return [*(path for path in named if path.exists()), *(file for file in files if file)]


def check_files(place: Path, files: Mapping[str, str], *, advice: str) -> None:
    """Raises BadInputError for the first file that is not what its stage wrote."""
    for name, digest in files.items():
        path = place / name
        if not path.is_file() or sha256_file(path) != digest:
            raise BadInputError(f"{path} is not the file that was written here: its sha256 differs. {advice}.")


def rounds_by_text(config: RunConfig) -> bool:
    """Whether weights of few bits are rounded by what the text makes of them."""
    from slimexport.targets import registry as targets

    each = (getattr(targets.get(name), "rounds_by_text", True) for name in config.target)
    return any(map(is_quantised, config.precision)) and any(each)


def check_same_text(text: TextSource | TextPart, tokens: int, since: str) -> None:
    """Raises BadInputError where what was read, as for `tokens` tokens, is a file of the user's and has changed; one
    that is gone has not."""
    if text.name in sources.NAMES or not Path(text.name).is_file():
        return
    if sources.read(text.name, "calibration", tokens).sha256 != text.sha256:
        raise BadInputError(f"{text.name} has changed {since}.")


def dense_model(
    config: RunConfig,
    fingerprint: str,
    *,
    streamed: bool = False,
    advice: str = "--force starts over, or --no-baseline",
) -> LoadedModel:
    """The model that was pruned. Raises BadInputError where it has this `fingerprint` no more."""
    from slimexport.loading import load_model

    loaded = load_model(config, streamed=streamed)
    if loaded.source.fingerprint != fingerprint:
        raise BadInputError(f"{config.model} has changed since it was pruned: {advice}.")
    return loaded


def check_windows(config: RunConfig, positions: int | None, *, prompts: bool = True) -> None:
    """Raises BadInputError for what the verify stage would refuse on a model of so many positions (None: as many as one
    likes), and for `prompts` that it could not measure, and would leave out."""
    wanted = {"eval_window": config.eval_window}
    if prompts and config.latency_runs and config.verify == "full":
        wanted["prompt_lengths"] = max(config.prompt_lengths, default=0)
    for name, value in wanted.items():
        if positions and value > positions:
            raise BadInputError(f"{name} {value} is longer than the model's {positions} positions.")
