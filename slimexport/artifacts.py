"""The values that travel between the stages, and how they are written to and read from the run directory.

All are frozen, and go to JSON through `write_json` / `from_dict`; those that hold a model in memory
(`loading.LoadedModel`, `pruning.stage.PrunedModel`) are elsewhere, their files are the checkpoint's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from slimexport.errors import BadInputError

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1

T = TypeVar("T")


# ---------------------------------------------------------------------------------------------- models and texts


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from. `fingerprint` is a sha256 over all files that end up in a checkpoint."""

    name: str
    kind: str  # directory | hub | gguf | builtin
    path: str
    revision: str | None
    fingerprint: str
    stored_dtype: str  # what the checkpoint will be saved in unless --save-dtype says otherwise
    license: str | None = None  # as its card or file names it


@dataclass(frozen=True)
class TextPart:
    """What one part of a mix gave: `tokens` of a text whose UTF-8 has `sha256`; `written` by the model, or read."""

    name: str
    tokens: int
    sha256: str
    license: str | None
    note: str | None
    written: bool


@dataclass(frozen=True)
class TextSource:
    """A text that was tokenised. `sha256` is of the UTF-8 text; of the token ids (int64, little-endian) for a mix."""

    name: str
    tokens: int
    sha256: str
    license: str | None = None
    note: str | None = None
    parts: tuple[TextPart, ...] = ()

    @property
    def written(self) -> bool:
        """Whether a mix came out as nothing but what a model wrote."""
        return bool(self.parts) and all(part.written for part in self.parts)

    @property
    def read(self) -> tuple[str, ...]:
        """The sha256 of every text that can be read again: not of what a model wrote."""
        return tuple(part.sha256 for part in self.parts if not part.written) or (self.sha256,)


@dataclass(frozen=True)
class CalibrationSet:
    """`input_ids` is int64 [sequences, sequence_length], no padding."""

    input_ids: torch.Tensor
    source: TextSource
    seed: int


# ------------------------------------------------------------------------------------------------------- pruning


@dataclass(frozen=True)
class BlockSizes:
    """What one block holds: `kv_groups` KV groups of `heads_per_group` query heads each, and `channels`."""

    kv_groups: int
    heads_per_group: int
    channels: int

    @property
    def query_heads(self) -> int:
        return self.kv_groups * self.heads_per_group


@dataclass(frozen=True)
class Estimates:
    """Follows from sizes alone; bytes in the stored dtype, FLOPs = 2 per multiply-add of the matrix products."""

    parameters: int
    block_parameters: int
    bytes: int
    decode_bytes_per_token: int  # weights streamed for one decoded token (batch 1), without the KV cache
    prefill_flops_per_token: int  # linear layers and lm_head, without the attention scores
    kv_cache_bytes_per_token: int
    head_flops: int = 0  # of prefill_flops_per_token, lm_head's: a graph may do that for the last token alone

    def prefill_flops(self, tokens: int, all_logits: bool) -> int:
        """Of a prompt of `tokens`, for all its logits or the last token's."""
        return (self.prefill_flops_per_token - self.head_flops) * tokens + self.head_flops * (
            tokens if all_logits else 1
        )


@dataclass(frozen=True)
class PruningCost:
    """What the prune stage will take on this machine: counted operations at a rate that was measured just now."""

    seconds: float
    peak_memory_bytes: int
    flops: float
    flops_per_second: float
    device: str
    peak_device_memory_bytes: int = 0  # of a CUDA device
    disk_bytes: int = 0
    hidden_states: str = "device"  # device | host | file: where those of the calibration set live


@dataclass(frozen=True)
class PruningPlan:
    """How much of every block stays. Legal (DESIGN.md, "Words") and rounded; `ratio` is what it removes exactly."""

    model_type: str
    criterion: str
    allocation: str
    layout: str  # uniform | per_layer
    ratio_asked: float
    ratio: float
    dense: tuple[BlockSizes, ...]
    blocks: tuple[BlockSizes, ...]
    dense_estimates: Estimates
    estimates: Estimates
    notes: tuple[str, ...] = ()
    cost: PruningCost | None = None  # filled by `slimexport plan` only


@dataclass(frozen=True)
class HeadCost:
    kv_groups: int
    heads_per_group: int
    cost: float


@dataclass(frozen=True)
class ChannelCost:
    channels: int
    cost: float


@dataclass(frozen=True)
class BlockCosts:
    """What each size of one block's heads and of its channels costs the model, the rest of it being dense."""

    heads: tuple[HeadCost, ...]
    channels: tuple[ChannelCost, ...]


@dataclass(frozen=True)
class JointCost:
    """The same cut made in every block: the sum of what it costs in each alone, and what it costs in all at once."""

    alone: float
    together: float


@dataclass(frozen=True)
class CostTable:
    """Costs in nats per token (KL of the model's output to the dense one), for every legal size of every block.

    `identity` is what they were measured on (model, text, settings): a table is used again only for the same.
    `joint_heads` and `joint_channels` say how costs of different blocks add up; empty: they do.
    """

    identity: Mapping[str, str]
    tokens: int
    blocks: tuple[BlockCosts, ...]
    seconds: float
    joint_heads: tuple[JointCost, ...] = ()
    joint_channels: tuple[JointCost, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockTrace:
    """What pruning did to one block. Errors are ||(W' - W) X||^2 / ||W X||^2, before and after compensation."""

    block: int
    query_heads: tuple[int, ...]  # indices kept, in the dense numbering
    kv_groups: tuple[int, ...]
    channels: tuple[int, ...]  # with experts numbered through: those of the first, then those of the second
    attention_error_before: float
    attention_error: float
    ffn_error_before: float
    ffn_error: float
    seconds_forward: float
    seconds_hessian: float
    seconds_selection: float
    damping: float
    peak_memory_bytes: int
    notes: tuple[str, ...] = ()
    seconds_fit: float = 0.0  # of what makes the FFN's channels
    factorised: str = ""  # the precisions that H was factorised in, joined by commas

    @property
    def seconds(self) -> float:
        return self.seconds_forward + self.seconds_hessian + self.seconds_selection + self.seconds_fit


@dataclass(frozen=True)
class ShrunkCheckpoint:
    """A Hugging Face directory that was reloaded in a fresh process and compared."""

    path: str
    parameters: int
    bytes: int
    files: Mapping[str, str]  # name -> sha256
    max_logit_difference: float  # reloaded against in memory; 0.0 or the stage fails


@dataclass(frozen=True)
class HeldOut:
    """What a model makes of windows it was not trained on: nats per token."""

    divergence: float  # KL of its output to the dense model's
    nll: float


@dataclass(frozen=True)
class RecoveryPoint:
    """Where recovery was after `step` steps; `divergence` is the mean over its domains."""

    step: int
    tokens: int
    seconds: float
    loss: float | None  # mean of the last steps; None before the first
    divergence: float
    judged: float  # what the best point has the least of: of the held-out windows, in the shares that are trained on
    held_out: Mapping[str, HeldOut]  # by domain
    weights: Mapping[str, float]  # by which domains took turns before it

    @property
    def nll(self) -> float:
        """Nats per token of the text, the mean over domains."""
        return sum(of.nll for of in self.held_out.values()) / len(self.held_out)


@dataclass(frozen=True)
class ChatCheck:
    """Whether the model still answers in its chat template: of `asked` prompts whose answers the dense model ends
    within `tokens` tokens, how many the shrunk one ended, before training and after it."""

    asked: int
    tokens: int
    pruned: int
    recovered: int


@dataclass(frozen=True)
class Recovery:
    """How the shrunk model was trained, and the checkpoint it became; None where it got no better."""

    method: str
    settings: Mapping[str, Any]
    texts: tuple[TextPart, ...]
    points: tuple[RecoveryPoint, ...]  # the first is the shrunk model as it was
    best: int  # index of the one that was kept
    steps: int
    tokens: int
    seconds: float
    stopped: str  # by: budget | patience | text | instability
    checkpoint: ShrunkCheckpoint | None = None
    notes: tuple[str, ...] = ()
    chat: ChatCheck | None = None  # None: the model has no template, or does not end its own answers so soon

    @property
    def kept(self) -> RecoveryPoint:
        return self.points[self.best]

    @property
    def gain(self) -> str:
        """Before and after, on held-out text, in words."""
        before, after = self.points[0], self.kept
        return (
            f"on held-out text {before.nll:.3f} to {after.nll:.3f} nats/token, "
            f"KL divergence to the dense model {before.divergence:.3f} to {after.divergence:.3f}"
        )


# ---------------------------------------------------------------------------------------------- export and verify


MANIFEST = "export.json"
"""What an exported directory says about itself."""


def is_quantised(precision: str) -> bool:
    """Whether the weights of an export in `precision` have few bits (int8, int4, int4-mixed)."""
    return precision.startswith("int")


@dataclass(frozen=True)
class ExportArtifact:
    """One exported model: a directory that stands alone, and how to call the graph in it."""

    path: str
    target: str
    builder: str  # mobius | transformers
    precision: str  # one of targets.base.PRECISIONS
    provider: str  # one of providers.PROVIDERS: what the graph was optimised for
    files: Mapping[str, str]  # name -> sha256
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kv_heads: tuple[int, ...]  # per block; 0: it has states instead
    head_dim: int
    left_padding: bool  # whether the graph is right with left padding; where not, the runtime refuses it
    shared_kv: bool = False  # whether past and present of every block may be one buffer
    passes: tuple[str, ...] = ()  # over the graph, those that changed it
    float_bytes: int = 0  # of matrices that a quantised graph still has in full
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """One number of the report, shrunk beside baseline.

    `name` is dotted ("accuracy.perplexity", "decode.tpot_ms.p50"). `ratio` is shrunk / baseline, with its confidence
    interval where one was measured; `ideal` is the ratio that the removed bytes or FLOPs would give, and `floor` what
    the shrunk model would take if this machine did nothing but read its weights or multiply. A figure with
    `valid=False` was measured too badly to be printed as a number; `note` says why.
    """

    name: str
    unit: str
    shrunk: float | None = None
    baseline: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    ideal: float | None = None
    better: str = "lower"  # lower | higher
    valid: bool = True
    note: str | None = None
    floor: float | None = None


@dataclass(frozen=True)
class Continuation:
    """Greedy text of both models after the same prompt, `tokens` of it, of which the first `same` are equal."""

    prompt: str
    shrunk: str
    dense: str | None
    tokens: int
    same: int


@dataclass(frozen=True)
class VerificationReport:
    """Everything measured on the exported graphs. `figures` is the flat view that gates and tables read."""

    figures: tuple[Figure, ...]
    numerics: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    latency: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    continuations: tuple[Continuation, ...] = ()
    tasks: dict[str, Any] = field(default_factory=dict)  # scores of every question, by task

    def figure(self, name: str) -> Figure | None:
        return next((f for f in self.figures if f.name == name), None)


# ------------------------------------------------------------------------------------------------------ JSON, files


def to_dict(value: Any) -> dict[str, Any]:
    """Dataclass -> plain dict with `schema_version` first."""
    return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(value)}


def from_dict(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Plain dict -> dataclass, nested and typed; raises BadInputError that names `where` and the field."""
    version = data.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise BadInputError(f"{where} has schema_version {version}, this slimexport reads {SCHEMA_VERSION}.")
    try:
        return _build(cls, {k: v for k, v in data.items() if k != "schema_version"})
    except (KeyError, TypeError, ValueError) as error:
        raise BadInputError(f"{where} is not a valid {cls.__name__}: {error}") from error


def _build(kind: Any, value: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = {f.name for f in dataclasses.fields(kind)}
        if unknown := set(value) - known:
            raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
        return kind(**{name: _build(hints[name], v) for name, v in value.items()})  # type: ignore[operator]
    if origin is tuple:
        return tuple(_build(args[0], v) for v in value)
    if origin in (dict, Mapping):
        return {k: _build(args[1], v) for k, v in value.items()}
    if hasattr(kind, "model_validate"):  # Gate, which is pydantic's
        return kind.model_validate(value)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _build(next(a for a in args if a is not type(None)), value)
    return value


def read_json(path: Path) -> Any:
    """Raises BadInputError for a missing, unreadable or truncated file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInputError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path} is not valid JSON ({error}); it may be truncated.") from error


def write_json(path: Path, data: Any) -> None:
    """Writes aside and renames; floats as Python prints them, keys in the given order."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes aside, syncs and renames, so that a reader sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a build artifact is for everybody
        replace(Path(temporary), path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_identity(earlier: Mapping[str, Any], now: Mapping[str, Any], place: Path) -> None:
    """Raises BadInputError with the first difference between what an interrupted run was made from, as it was read
    from JSON, and what this one is."""
    now = json.loads(json.dumps(now, default=str))
    for key in sorted({*earlier, *now}):
        if earlier.get(key) != now.get(key):
            raise BadInputError(
                f"Cannot resume {place}: the interrupted run had {key} = {earlier.get(key)!r}, "
                f"this one has {now.get(key)!r}. Use the same options, or start over with --force."
            )


@contextmanager
def staged_directory(path: Path) -> Iterator[Path]:
    """Yields an empty sibling `.<name>.partial`; on success it replaces `path`, on failure it is removed.

    A killed process leaves the sibling behind: the next call clears it, and `path` never holds half a stage, nor does
    it after a power cut: all is on the disk before it gets its name.
    """
    path = Path(path)
    partial = path.parent / f".{path.name}.partial"
    remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in sorted(p for p in partial.rglob("*") if not p.is_symlink()):
            sync(file)
        remove(path)
        replace(partial, path)
    except BaseException:
        remove(partial)
        raise


def replace(source: Path, path: Path) -> None:
    """`os.replace`, which after this call even a power cut does not undo."""
    os.replace(source, path)
    sync(Path(path).parent)


def sync(path: Path) -> None:
    """What is in this file or directory is on the disk now."""
    if os.name != "posix":  # Windows opens no directories, and nothing that is not to be written
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Removes a file, a directory with all it holds, or a link (never what a link points to); nothing is fine too."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_tree(directory: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file below `directory`, sorted by name."""
    files = sorted(p for p in Path(directory).rglob("*") if p.is_file())
    return {p.relative_to(directory).as_posix(): sha256_file(p) for p in files}
