"""RunConfig: everything that decides the result of a run, in one frozen, validated model.

Built from a YAML recipe and from flags (flags win). What does not change the result (`--resume`, `--force`, `--quiet`,
`--json`, `--debug`) is not in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slimexport.errors import BadInputError, nearest

Operator = Literal["<=", ">="]
GateOf = Literal["shrunk", "baseline", "ratio", "speedup"]


class Gate(BaseModel):
    """A figure of the report, an operator and a bound: `accuracy.perplexity` of `ratio` `<=` 1.5."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    figure: str
    of: GateOf = "shrunk"
    op: Operator = "<="
    bound: float


class RunConfig(BaseModel):
    """One run. Field descriptions are the help texts of the flags."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # load
    model: str = Field(description="Local directory, Hub id, .gguf file, or the built-in smollm2-135m.")
    revision: str | None = Field(None, description="Revision of a Hub model.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of the forward passes; auto is float32 on the CPU, the stored one on CUDA."
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of the written checkpoint; auto is the input's (a GGUF becomes float32)."
    )
    seed: int = Field(0, ge=0, description="The one seed of everything random.")

    # calibrate
    calibration: str = Field(
        "default",
        description="A .txt or .jsonl file, dataset:NAME[:CONFIG[:SPLIT[:COLUMN]]], self (text the model writes), or default.",
    )
    calibration_tokens: int = Field(32768, ge=1, description="Tokens of calibration text.")
    sequence_length: int = Field(512, ge=8, description="Tokens per calibration sequence.")

    # prune
    ratio: float = Field(0.25, description="Share of the block linear parameters to remove.")
    criterion: str = Field("slimgpt", description="What scores heads and channels.")
    allocation: str = Field("auto", description="How the ratio is spread over the blocks; auto follows the layout.")
    first_ratio: float | None = Field(None, description="incremental: ratio of the first block; default: solved.")
    layout: Literal["auto", "per_layer", "uniform"] = Field(
        "auto", description="per_layer: sizes differ by block; uniform: a plain config that loads anywhere."
    )
    round_to: int = Field(32, ge=1, description="Channels are rounded to multiples of this.")
    group_size_start: int = Field(64, ge=1, description="Channels removed at once at the beginning.")
    group_size_end: int = Field(1, ge=1, description="Channels removed at once at the end; 1 and 1 is exact greedy.")
    damping: float = Field(0.01, gt=0, description="Added to the diagonal of H, as a share of its mean.")

    # export
    target: tuple[str, ...] = Field(("onnx",), description="What to export to.")
    exporter: Literal["auto", "mobius", "transformers"] = Field("auto", description="Graph builder; auto tries in order.")
    provider: Literal["cpu", "cuda"] = Field("cpu", description="ONNX Runtime execution provider.")
    baseline: bool = Field(True, description="Export and measure the dense model beside the shrunk one.")
    baseline_cache: Path | None = Field(None, description="Directory that keeps dense graphs across runs.")

    # verify
    eval_text: str = Field("default", description="Text for perplexity and KL: a .txt or .jsonl file, or default.")
    eval_tokens: int = Field(16384, ge=2, description="Tokens of evaluation text.")
    eval_window: int = Field(512, ge=2, description="Window of the perplexity, without overlap.")
    prompt_lengths: tuple[int, ...] = Field((32, 128, 512), description="Prompt lengths for TTFT.")
    decode_tokens: int = Field(64, ge=2, description="Tokens decoded per latency run.")
    latency_runs: int = Field(10, ge=0, description="Interleaved latency runs per model; 0 leaves latency out.")
    threads: int | None = Field(None, ge=1, description="ONNX Runtime threads; default: the affinity mask.")

    # gate
    max_perplexity_ratio: float | None = Field(None, gt=0, description="Fail if perplexity / dense is above.")
    max_kl: float | None = Field(None, ge=0, description="Fail if the KL divergence to the dense model is above (nats).")
    min_speedup: float | None = Field(None, gt=0, description="Fail if decoding is not this many times faster.")
    max_latency_ms: float | None = Field(None, gt=0, description="Fail if the median time per output token is above.")
    max_size_mb: float | None = Field(None, gt=0, description="Fail if the exported files are larger (MB = 1e6 bytes).")
    gates: tuple[Gate, ...] = Field((), description="Further gates: figure, of, op, bound.")

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be at least 0 and below 1, not {self.ratio}")
        if self.group_size_end > self.group_size_start:
            raise ValueError("group_size_end must not be larger than group_size_start")
        if self.layout == "uniform" and self.allocation not in ("auto", "uniform"):
            raise ValueError(f"layout uniform has the same sizes in every block: allocation {self.allocation!r} cannot differ")
        if self.first_ratio is not None and not 0 <= self.first_ratio < 1:
            raise ValueError(f"first_ratio must be at least 0 and below 1, not {self.first_ratio}")
        return self

    @property
    def resolved_layout(self) -> str:
        if self.layout == "auto":
            return "uniform" if self.allocation == "uniform" else "per_layer"
        return self.layout

    @property
    def resolved_allocation(self) -> str:
        if self.allocation == "auto":
            return "uniform" if self.layout == "uniform" else "incremental"
        return self.allocation

    def all_gates(self) -> tuple[Gate, ...]:
        """The sugar flags as gates, then the declared ones."""
        sugar = [
            (self.max_perplexity_ratio, "accuracy.perplexity", "ratio", "<="),
            (self.max_kl, "accuracy.kl", "shrunk", "<="),
            (self.min_speedup, "decode.tpot_ms", "speedup", ">="),
            (self.max_latency_ms, "decode.tpot_ms", "shrunk", "<="),
            (self.max_size_mb, "size.export_mb", "shrunk", "<="),
        ]
        made = tuple(
            Gate(figure=figure, of=of, op=op, bound=bound)  # type: ignore[arg-type]
            for bound, figure, of, op in sugar
            if bound is not None
        )
        return made + self.gates


def make_config(values: dict[str, Any], where: str = "recipe") -> RunConfig:
    """Validates `values`; raises BadInputError that names `where`, the key, and the nearest known key."""
    for key in values:
        if key not in RunConfig.model_fields:
            raise BadInputError(f"{where}: unknown key {key!r}.{nearest(key, RunConfig.model_fields)}")
    try:
        return RunConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "configuration"
        message = first["msg"].removeprefix("Value error, ")
        shown = f" (got {first['input']!r})" if first["loc"] and first["type"] != "missing" else ""
        raise BadInputError(f"{where}: {key}: {message}{shown}.") from error
