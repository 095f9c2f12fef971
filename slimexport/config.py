"""RunConfig: everything that decides the result of a run, in one frozen, validated model.

Built from a YAML recipe and from flags (flags win). What does not change the result (`--resume`, `--force`, `--quiet`,
`--json`, `--debug`) is not in it.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from slimexport.artifacts import is_quantised
from slimexport.errors import BadInputError, SlimExportError, UsageError, nearest
from slimexport.gates import figures
from slimexport.gates.declared import SHORT, Gate, gates_of, over
from slimexport.providers import parsed
from slimexport.recovery.budget import Budget
from slimexport.tasks.named import parse as parse_task

CURVATURE_TOKENS = 4096
RECOVERY = "distill"  # of `slimexport recover`, which need not be told how
REFIT = 0.3  # docs/pruning.md: smaller ridges fit the noise of the calibration text


class RunConfig(BaseModel):
    """One run. Field descriptions are the help texts of the flags."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # load
    model: str = Field(description="Local directory, Hub id, .gguf file, or the built-in smollm2-135m.")
    revision: str | None = Field(default=None, description="Revision of a Hub model.")
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")
    architecture: Literal["known", "auto"] = Field(
        default="known",
        description="auto: read the table of a family that has none off its modules, and check it on a tiny model.",
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Precision of the forward passes; auto is float32 on the CPU, the stored one on CUDA.",
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Precision of the written checkpoint; auto is the input's (a GGUF becomes float32)."
    )
    seed: int = Field(default=0, ge=0, description="The one seed of everything random.")

    # calibrate
    calibration: str = Field(
        default="default",
        description="A .txt or .jsonl file, dataset:NAME[:CONFIG[:SPLIT[:COLUMN]]], mix:PART=WEIGHT,..., a part "
        "of ours (wikipedia, news, code, questions, chat, self), or default: a mix.",
    )
    calibration_tokens: int = Field(default=65536, ge=1, description="Tokens of calibration text.")
    sequence_length: int = Field(default=512, ge=8, description="Tokens per calibration sequence.")

    # prune
    ratio: float = Field(default=0.25, ge=0, lt=1, description="Share of the block linear parameters to remove.")
    criterion: str = Field(default="slimgpt", description="What scores heads and channels.")
    allocation: str = Field(
        default="auto", description="How the ratio is spread over the blocks; auto follows the layout."
    )
    fast: bool = Field(
        default=False,
        description="Plan without measuring (allocation incremental), leave out re-fit and curvature.",
    )
    first_ratio: float | None = Field(
        default=None, ge=0, lt=1, description="incremental, arithmetic: ratio of the first block."
    )
    head_weight: float = Field(
        default=0.6,
        ge=0,
        description="Where ratios go by block: that of the heads relative to the block's; channels make up the rest.",
    )
    sizes: Path | None = Field(
        default=None, description="explicit: a YAML or JSON table of sizes, or the plan.json of an earlier run."
    )
    costs: Path | None = Field(
        default=None,
        description="sensitivity, search: the measured costs; read if the file is there, else measured and kept there.",
    )
    probe_tokens: int = Field(default=2048, ge=8, description="Tokens on which costs are measured.")
    search_seconds: float = Field(
        default=600, gt=0, description="search: stop after this time, however fast the machine is."
    )
    search_evaluations: int = Field(default=64, ge=1, description="search: stop after this many plans.")
    refit: float | None = Field(
        default=None,
        ge=0,
        description="Ridge of the re-fit toward the dense model, as a share of H's mean diagonal; 0: none.",
    )
    curvature_tokens: int | None = Field(
        default=None,
        ge=0,
        description="Tokens on which to measure how much the output minds errors, to weight them; 0: all count alike.",
    )
    bias_compensation: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="flap: keep its biases; auto: where the family's config can say them, on: refuse where not.",
    )
    layout: Literal["auto", "per_layer", "uniform"] = Field(
        default="auto", description="per_layer: sizes differ by block; uniform: a plain config that loads anywhere."
    )
    round_to: int = Field(default=32, ge=1, description="Channels are rounded to multiples of this.")
    group_size_start: int | None = Field(
        default=None,
        ge=1,
        description="Channels removed at once at the beginning; default: 64, of wide FFNs as large a share.",
    )
    group_size_end: int | None = Field(
        default=None,
        ge=1,
        description="Channels removed at once at the end; 1 and 1 is exact greedy; default: 1, of wide FFNs as large "
        "a share.",
    )
    damping: float = Field(default=0.01, gt=0, description="Added to the diagonal of H, as a share of its mean.")

    # recover
    recover: str = Field(
        default="none",
        description="Train the shrunk model after pruning, toward the dense model's output: distill (all weights of "
        "the blocks), lora (adapters that are merged), local (every block by itself).",
    )
    recover_budget: str = Field(
        default="20m", description="How long to train: a time (20m, 1h30m), or 500k tokens, or 200 steps."
    )
    recover_text: str = Field(
        default="default",
        description="What to train on, as --calibration names it; parts of a mix are domains that take turns.",
    )
    recover_learning_rate: float | None = Field(
        default=None, gt=0, description="Highest, after warm-up; default: the method's own."
    )
    recover_optimizer: Literal["adamw", "adamw-8bit"] = Field(
        default="adamw", description="adamw-8bit: its moments take a quarter of the memory (needs slimexport[8bit])."
    )
    recover_rank: int = Field(default=16, ge=1, description="lora: rank of the adapters.")
    recover_sequences: int = Field(default=4, ge=1, description="Sequences in one step.")
    recover_length: int = Field(default=512, ge=8, description="Tokens per sequence that is trained on.")
    recover_text_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the loss that is the text's; the rest is the dense model's.",
    )
    recover_temperature: float = Field(default=1.0, gt=0, description="At which outputs are compared.")
    recover_hidden_weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight of a further loss: how far the blocks' outputs are from dense.",
    )

    # limits
    max_memory: str | None = Field(
        default=None,
        description="Memory that pruning may take, such as 6GB or 4GiB; hidden states go to a file to keep it.",
    )
    max_device_memory: str | None = Field(
        default=None,
        description="CUDA memory that pruning may take; hidden states go to the host, or to a file, to keep it.",
    )

    # export
    target: tuple[str, ...] = Field(
        default=("onnx",), min_length=1, description="What to export to: onnx, genai, safetensors, gguf."
    )
    exporter: Literal["auto", "mobius", "transformers"] = Field(
        default="auto", description="Graph builder; auto tries in order."
    )
    provider: Literal["cpu", "cuda", "tensorrt", "openvino", "directml", "coreml"] = Field(
        default="cpu", description="ONNX Runtime execution provider; all but cpu are untested."
    )
    provider_option: tuple[str, ...] = Field(
        default=(), description="KEY=VALUE for the execution provider, as ONNX Runtime documents them."
    )
    precision: tuple[Literal["fp32", "fp16", "bf16", "int8", "int4", "int4-mixed"], ...] = Field(
        default=("fp32",),
        min_length=1,
        description="Of the graph; int8, int4: of its weights alone (mixed: 8 bits for embedding and lm_head).",
    )
    rounding_tokens: int = Field(
        default=8192,
        ge=0,
        description="int8, int4: tokens of the calibration text to round weights by; 0: to the nearest.",
    )
    without_pass: tuple[Literal["gate_up", "last_logits", "unread"], ...] = Field(
        default=(), description="A pass over the graph to leave out."
    )
    verify: Literal["full", "light"] = Field(
        default="full",
        description="light: for models larger than memory; one prompt, accuracy in torch block by block, no latency.",
    )
    baseline: bool = Field(default=True, description="Export and measure the dense model beside the shrunk one.")
    baseline_cache: Path | None = Field(default=None, description="Directory that keeps dense graphs across runs.")

    # verify
    eval_text: str = Field(
        default="default",
        description="Text for perplexity and KL: a file, dataset:..., wikipedia, news, code, or default.",
    )
    eval_tokens: int = Field(default=16384, ge=2, description="Tokens of evaluation text.")
    eval_window: int = Field(default=512, ge=2, description="Window of the perplexity, without overlap.")
    tasks: tuple[str, ...] = Field(
        default=(), description="Tasks of lm-eval: NAME, or NAME=FILE with its questions in a local file."
    )
    task_limit: int | None = Field(default=None, ge=1, description="The first questions of each task; default: all.")
    continuations: int = Field(
        default=3, ge=0, description="Places of the evaluation text after which the report shows how both models go on."
    )
    prompt_lengths: tuple[int, ...] = Field(default=(32, 128, 512), description="Prompt lengths for TTFT.")
    decode_tokens: int = Field(default=64, ge=2, description="Tokens decoded per latency run.")
    latency_runs: int = Field(default=10, ge=0, description="Interleaved latency runs per model; 0 leaves latency out.")
    max_latency_runs: int = Field(
        default=80, ge=0, description="As many latency runs at most, where a gate on a time cannot be decided by fewer."
    )
    threads: int | None = Field(default=None, ge=1, description="ONNX Runtime threads; default: the affinity mask.")

    # gate
    max_perplexity_ratio: float | None = Field(default=None, gt=0, description="Fail if perplexity / dense is above.")
    max_kl: float | None = Field(
        default=None, ge=0, description="Fail if the KL divergence to the dense model is above (nats)."
    )
    min_speedup: float | None = Field(default=None, gt=0, description="Fail if decoding is not this many times faster.")
    max_latency_ms: float | None = Field(
        default=None, gt=0, description="Fail if the median time per output token is above."
    )
    max_size_mb: float | None = Field(
        default=None, gt=0, description="Fail if the graph with its weights is larger (MB = 1e6 bytes)."
    )
    gates: tuple[Gate, ...] = Field(
        default=(),
        description="A further gate, such as accuracy.kl<=0.2, ratio(FIGURE)<=1.5 or speedup(FIGURE)>=1.2; it replaces "
        "one on the same figure in a recipe or, for `report`, of the run.",
    )
    against: Path | None = Field(
        default=None,
        description="Run directory or report.json of an earlier run, for gates like earlier(FIGURE)<=1.02.",
    )
    on_undecided: Literal["fail", "warn"] = Field(
        default="fail", description="What a gate does whose figure is not known well enough to tell."
    )

    @field_validator("target", "precision", "provider_option", "without_pass", "prompt_lengths", "tasks", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | int | Mapping) else value

    @field_validator("gates", mode="before")
    @classmethod
    def _gates_as_they_are_written(cls, value: Any) -> Any:
        return gates_of(value)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: Any) -> Any:
        # pydantic would take `seed: yes` for 1; only the two switches are booleans. YAML takes on and off for some.
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and {"on", "off"} <= set(typing.get_args(kind)):
            return "on" if value else "off"
        if isinstance(value, bool) and kind is not bool:
            raise ValueError("Input should not be a boolean")
        return value

    @field_validator("max_memory", "max_device_memory", mode="before")
    @classmethod
    def _limits_have_a_unit(cls, value: Any) -> Any:
        if value is not None:
            bytes_of(str(value))
        return value if value is None else str(value)

    @field_validator("recover_budget")
    @classmethod
    def _budgets_are_budgets(cls, value: str) -> str:
        Budget.parse(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if any(length < 1 for length in self.prompt_lengths):
            raise ValueError(f"prompt_lengths must be at least 1, not {min(self.prompt_lengths)}")
        parsed(self.provider_option)
        named = [parse_task(spec).name for spec in self.tasks]
        if len(set(named)) < len(named):
            raise ValueError(f"a task is named twice: {', '.join(named)}")
        if self.group_size_end and self.group_size_start and self.group_size_end > self.group_size_start:
            raise ValueError("group_size_end must not be larger than group_size_start")
        if self.verify == "light" and self.tasks:
            raise ValueError("tasks are asked of whole models in memory: they need verify full")
        if self.verify == "light" and any(map(is_quantised, self.precision)):
            raise ValueError("light verification does not see what rounding costs: quantised weights need verify full")
        if self.sizes is not None and self.allocation not in ("auto", "explicit"):
            raise ValueError(
                f"sizes are given, which allocation {self.allocation!r} does not read: leave one of them out"
            )
        if self.fast and self.allocation in ("sensitivity", "search"):
            raise ValueError(f"fast leaves out the measuring that allocation {self.allocation!r} needs: choose one")
        if self.layout == "uniform" and self.allocation in ("incremental", "arithmetic", "search"):
            raise ValueError(
                f"layout uniform has the same sizes in every block: allocation {self.allocation!r} cannot differ"
            )
        return self

    @property
    def resolved_layout(self) -> str:
        if self.layout == "auto":
            return "uniform" if self.allocation == "uniform" else "per_layer"
        return self.layout

    @property
    def resolved_allocation(self) -> str:
        if self.allocation == "auto":
            if self.sizes is not None:
                return "explicit"
            return ("uniform" if self.layout == "uniform" else "incremental") if self.fast else "sensitivity"
        return self.allocation

    @property
    def resolved_refit(self) -> float:
        """0.0 where there is none: it belongs to criteria that compensate, and costs a second stream."""
        if self.refit is not None:
            return self.refit
        return 0.0 if self.fast or self.criterion != "slimgpt" else REFIT

    @property
    def resolved_curvature_tokens(self) -> int:
        """0 where errors are not weighted: it belongs to the criterion that minimises them."""
        if self.curvature_tokens is not None:
            return self.curvature_tokens
        return 0 if self.fast or self.criterion != "slimgpt" else CURVATURE_TOKENS

    @property
    def memory_limit(self) -> int | None:
        """Bytes."""
        return None if self.max_memory is None else bytes_of(self.max_memory)

    @property
    def device_memory_limit(self) -> int | None:
        """Bytes."""
        return None if self.max_device_memory is None else bytes_of(self.max_device_memory)

    @property
    def provider_options(self) -> dict[str, str]:
        return parsed(self.provider_option)

    def all_gates(self) -> tuple[Gate, ...]:
        """The ones in short, then the declared ones."""
        bounds = {name: getattr(self, name) for name in SHORT}
        made = tuple(
            Gate(figure=figure, of=of, op=op, bound=bounds[name])
            for name, (figure, of, op) in SHORT.items()
            if bounds[name] is not None
        )
        return made + self.gates


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip


def bytes_of(text: str) -> int:
    """6GB, 6G, 5.5GiB, 4096MB, or a number of bytes. Raises ValueError for anything else."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmgt]?i?)b?", text.strip().lower())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise ValueError(f"{text!r} is no amount of memory: 6GB, 5.5GiB, or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2]])


def make_config(values: Mapping[str, Any], where: str = "recipe", flags: Collection[str] = ()) -> RunConfig:
    """Validates `values`; raises BadInputError that names `where`, the key, and the nearest known key.

    Keys in `flags` came from the command line: an error in one of them is a UsageError that names the flag.
    """
    check_keys(values, where)
    try:
        config = RunConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        shown = f" (got {first['input']!r})" if key and first["type"] not in ("missing", "value_error") else ""
        kind: type[SlimExportError] = BadInputError
        if key.split(".")[0] in flags:
            kind, where, key = UsageError, f"--{key.replace('_', '-')}", ""
        raise kind(": ".join(part for part in (where, key, f"{message}{shown}.") if part)) from error
    try:
        figures.check(config.gates, config.prompt_lengths, [spec.partition("=")[0] for spec in config.tasks])
    except ValueError as error:
        message = str(error) if str(error).endswith("?") else f"{error}."
        if "gates" in flags:
            raise UsageError(f"--gate: {message}") from error
        raise BadInputError(f"{where}: gates: {message}") from error
    return config


def layered(below: Mapping[str, Any], flags: Mapping[str, Any], where: str) -> RunConfig:
    """`flags` over the settings `below`, which stand in `where`; raises as `make_config` does."""
    values = over(below, flags)
    if below.get("gates") and flags.get("gates"):  # an error in the former is not the flag's
        make_config({**values, "gates": below["gates"]}, where, flags.keys() - {"gates"})
    return make_config(values, where, flags.keys())


def check_keys(values: Mapping[str, Any], where: str) -> None:
    """Raises BadInputError for the first key that RunConfig does not know, with the nearest one."""
    for key in values:
        if key not in RunConfig.model_fields:
            raise BadInputError(f"{where}: unknown key {key!r}.{nearest(str(key), RunConfig.model_fields)}")
