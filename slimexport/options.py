"""Command-line options that follow from the fields of RunConfig: name, type, help and default, written once there.

They are made when a command is really called or asks for its help, so that `slimexport --help` does not wait for
pydantic.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

# The fields of RunConfig by stage; a command shows the stages that matter to it, as sections of its help.
STAGES: Mapping[str, tuple[str, ...]] = {
    "load": ("revision", "trust_remote_code", "architecture", "device", "dtype", "save_dtype", "seed"),
    "calibrate": ("calibration", "calibration_tokens", "sequence_length"),
    "prune": (
        "ratio", "fast", "criterion", "allocation", "layout", "sizes", "costs", "probe_tokens", "search_seconds",
        "search_evaluations", "refit", "curvature_tokens", "first_ratio", "head_weight", "round_to", "group_size_start",
        "group_size_end", "damping", "bias_compensation",
    ),
    "recover": (
        "recover", "recover_budget", "recover_text", "recover_learning_rate", "recover_optimizer", "recover_rank",
        "recover_sequences", "recover_length", "recover_text_share", "recover_temperature", "recover_hidden_weight",
    ),
    "limits": ("max_memory", "max_device_memory"),
    "export": (
        "target", "precision", "exporter", "provider", "provider_option", "rounding_tokens", "without_pass", "verify",
        "baseline",
        "baseline_cache",
    ),
    "verify": (
        "eval_text", "eval_tokens", "eval_window", "tasks", "task_limit", "continuations", "prompt_lengths",
        "decode_tokens", "latency_runs",
        "max_latency_runs", "threads",
    ),
    "gate": (
        "max_perplexity_ratio", "max_kl", "min_speedup", "max_latency_ms", "max_size_mb", "gates", "against",
        "on_undecided",
    ),
}  # fmt: skip

_SINGULAR = {"gates": "gate"}  # --gate is given once per gate


class ConfigCommand(click.Command):
    """A command that also takes the fields of RunConfig which belong to `stages`."""

    def __init__(self, *args: Any, stages: tuple[str, ...] = (), without: tuple[str, ...] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stages, self.without = stages, without

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(name for stage in self.stages for name in STAGES[stage] if name not in self.without)

    @cached_property
    def _options(self) -> dict[str, click.Option]:
        from slimexport.config import RunConfig

        return {name: _option(name, RunConfig.model_fields[name]) for name in self.fields}

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        return [*own[:-1], *self._options.values(), own[-1]]  # --help stays last

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        config = set(self._options.values())
        own = [p for p in self.get_params(ctx) if isinstance(p, click.Option) and p not in config]
        rows = [option.get_help_record(ctx) for option in own]
        with formatter.section("Options"):
            formatter.write_dl([row for row in rows if row])
        for stage in self.stages:
            rows = [self._options[name].get_help_record(ctx) for name in STAGES[stage] if name in self.fields]
            with formatter.section(stage.capitalize()):
                formatter.write_dl([row for row in rows if row])


def given(ctx: click.Context) -> dict[str, Any]:
    """The fields of RunConfig that stand on the command line (not the defaults: a recipe beats those)."""
    command = ctx.command
    assert isinstance(command, ConfigCommand)
    typed = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return {name: ctx.params[name] for name in command.fields if ctx.get_parameter_source(name) in typed}


def _option(name: str, field: FieldInfo) -> click.Option:
    kind, many = _plain(field.annotation)
    flag = _SINGULAR.get(name, name).replace("_", "-")
    text = f"{field.description}{_default(field.default)}"
    if kind is bool:
        return click.Option([f"--{flag}/--no-{flag}", name], default=None, help=text)
    if not many:
        return click.Option([f"--{flag}", name], type=_click_type(kind), default=None, help=text)
    metavar = "SPEC" if name == "gates" else None
    if name == "provider_option":  # its values may hold commas: one flag for each
        return click.Option([f"--{flag}"], type=click.STRING, multiple=True, help=text)
    joined = _Listed(_click_type(kind))
    return click.Option([f"--{flag}", name], type=joined, multiple=True, metavar=metavar, help=text, callback=_flatten)


def _plain(annotation: Any) -> tuple[Any, bool]:
    """The type of one value, and whether there may be several: `tuple[int, ...]` -> (int, True)."""
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    options = [a for a in typing.get_args(annotation) if a is not type(None)]
    if options and typing.get_origin(annotation) is not Literal:
        return options[0], False  # X | None
    return annotation, False


def _click_type(kind: Any) -> click.ParamType:
    from slimexport.gates.declared import Gate

    if typing.get_origin(kind) is Literal:
        return click.Choice(typing.get_args(kind))
    if kind is Gate:
        return _GateType()
    if kind is Path:
        return click.Path(path_type=Path)
    plain: dict[Any, click.ParamType] = {int: click.INT, float: click.FLOAT, str: click.STRING}
    return plain[kind]


def _default(default: Any) -> str:
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        default = "on" if default else "off"
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f"  [default: {default}]"


class _Listed(click.ParamType):
    """One or more values in a word: `--target onnx,genai` is `--target onnx --target genai`."""

    def __init__(self, item: click.ParamType):
        self.item, self.name = item, item.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return tuple(self.item.convert(part.strip(), param, ctx) for part in str(value).split(","))


def _flatten(ctx: click.Context, param: click.Parameter, value: Any) -> tuple[Any, ...]:
    return tuple(item for listed in value or () for item in listed)


class _GateType(click.ParamType):
    name = "gate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from slimexport.gates.declared import Gate

        try:
            return Gate.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
