"""A calibration text of several kinds, because a model that was calibrated on one kind loses far more on the others.

    default                                        the mix of `DEFAULT`
    mix:wikipedia=0.5,code=0.2,chat=0.3            names of ours, with weights
    mix:letters.jsonl=0.6,dataset:NAME=1,news=0.2  files and Hub datasets; weights need not sum to 1

Every part gives whole sequences: their numbers follow the weights, and each part has one at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.artifacts import TextPart
from slimexport.errors import BadInputError, nearest
from slimexport.texts import Text, sources
from slimexport.texts.files import EXTENSIONS
from slimexport.texts.windows import check_tokens, grid, pack, spread

if TYPE_CHECKING:
    import torch

    from slimexport.texts.generated import Progress

PREFIX = "mix:"
FORM = "mix:PART=WEIGHT,PART=WEIGHT,..."
# Chosen by what is at hand, not tuned: most of it edited prose; the 102 questions are 8 sequences of 512 tokens in all.
# The model's own answers (`chat`) are left to be asked for: on two cores they take as long as a pass over the rest.
DEFAULT = {"wikipedia": 0.5, "news": 0.2, "code": 0.2, "questions": 0.1}

UNLIMITED = 1 << 62  # sequences


@dataclass(frozen=True)
class Mixed:
    """`input_ids` is int64 [sequences, length]; `notes` say what was left out, and why."""

    input_ids: torch.Tensor
    parts: tuple[TextPart, ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        total = sum(part.tokens for part in self.parts)
        return f"a mix: {', '.join(f'{part.tokens / total:.0%} {part.name}' for part in self.parts)}"

    @property
    def license(self) -> str | None:
        return "; ".join(f"{part.name}: {part.license}" for part in self.parts if part.license) or None

    @property
    def note(self) -> str | None:
        return "; ".join((*(f"{part.name}: {part.note}" for part in self.parts if part.note), *self.notes)) or None


# ---------------------------------------------------------------------------------------------- the specification


def is_mix(spec: str) -> bool:
    return spec == "default" or spec.startswith(PREFIX)


def parse(spec: str) -> dict[str, float]:
    """The parts and their weights, which sum to 1; parts of weight 0 are left out. Raises BadInputError."""
    weights = DEFAULT if spec == "default" else _weights(spec)
    total = sum(weights.values())
    if total == 0:
        raise BadInputError(f"The weights in {spec!r} sum to zero: one part at least needs a weight above zero.")
    return {name: weight / total for name, weight in weights.items() if weight > 0}


def files(spec: str) -> tuple[Path, ...]:
    """The user's files that a mix is made of; none for what is no mix."""
    return tuple(Path(name).expanduser() for name in parse(spec) if _is_file(name)) if is_mix(spec) else ()


def absolute(spec: str) -> str:
    """The same mix with absolute paths, for another working directory."""
    if spec == "default":
        return spec
    whole = {str(Path(n).expanduser().resolve()) if _is_file(n) else n: w for n, w in _weights(spec).items()}
    for name in whole:
        if "," in name:
            raise BadInputError(
                f"{name}: a path with a comma cannot be part of a mix; copy or link the file elsewhere."
            )
    return PREFIX + ",".join(f"{name}={weight!r}" for name, weight in whole.items())


def writes(spec: str) -> bool:
    """Whether the model writes any of what `spec` names."""
    return bool(_named(spec) & set(sources.WRITTEN))


def written(spec: str) -> bool:
    """Whether the model writes all of a calibration text: then none of it is in any other text."""
    return _named(spec) <= set(sources.WRITTEN)


def _named(spec: str) -> set[str]:
    return set(parse(spec) if is_mix(spec) else (spec,))


def _weights(spec: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for item in spec.removeprefix(PREFIX).split(","):
        name, equals, weight = (piece.strip() for piece in item.rpartition("="))
        if not equals or not name:
            raise BadInputError(f"{item.strip()!r} in {spec!r} is not of the form PART=WEIGHT: {FORM} is needed.")
        _check_name(name, spec)
        if name in weights:
            raise BadInputError(f"{name} is in {spec!r} twice: give it one weight.")
        weights[name] = _weight(name, weight)
    return weights


def _is_file(name: str) -> bool:
    return name not in sources.NAMES and not name.startswith("dataset:")


def _check_name(name: str, spec: str) -> None:
    if _is_file(name) and not name.lower().endswith(EXTENSIONS):
        raise BadInputError(
            f"{name!r} in {spec!r} is no part: {', '.join(sources.NAMES)}, a .txt or .jsonl file or dataset:NAME is "
            f"needed.{nearest(name, sources.NAMES)}"
        )


def _weight(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = float("nan")
    if not 0 <= weight < float("inf"):
        raise BadInputError(f"The weight of {name} is {text!r}: a number that is not negative is needed.")
    return weight


# ------------------------------------------------------------------------------------------------ how many of which


def apportion(weights: Sequence[float], limits: Sequence[int], count: int) -> list[int]:
    """`count` seats by weight: one at least for each, at most its limit, largest remainder, ties to the first.

    What is above a limit is handed on to the others. `count` must lie between the number of parts and the limits' sum.
    """
    seats = [0] * len(weights)
    free = list(range(len(weights)))
    quotas: dict[int, float] = {}
    while free:
        left, total = count - sum(seats), sum(weights[i] for i in free)
        quotas = {i: left * weights[i] / total for i in free}
        few, many = [i for i in free if quotas[i] < 1], [i for i in free if quotas[i] > limits[i]]
        if not few and not many:
            break
        # Those that need more than they have, and those that have more than they can take: the greater side is settled
        # first, as it decides whether the quotas of the others will fall or rise.
        first = sum(1 - quotas[i] for i in few) >= sum(quotas[i] - limits[i] for i in many)
        for i in few if first else many:
            seats[i] = 1 if first else limits[i]
            free.remove(i)
    for i in free:
        seats[i] = int(quotas[i])
    by_remainder = sorted(free, key=lambda i: seats[i] - quotas[i])  # stable: ties to the first
    for i in by_remainder[: count - sum(seats)]:
        seats[i] += 1
    return seats


def interleave(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(part, place in the part) of every sequence in its order: each part is spread evenly over the whole."""
    places = [(part, place) for part, count in enumerate(counts) for place in range(count)]
    return sorted(places, key=lambda at: ((2 * at[1] + 1) / (2 * counts[at[0]]), at[0]))


# ----------------------------------------------------------------------------------------------------- the windows


@dataclass(frozen=True)
class _Source:
    """A part that is there: how many sequences it can give, and how to get the first, second, ... of `count`."""

    name: str
    weight: float
    limit: int
    draw: Callable[[int], tuple[torch.Tensor, Text]]


def mixed(
    spec: str,
    tokenizer: Any,
    model: Any,
    count: int,
    length: int,
    seed: int,
    progress: Progress = lambda done, total, text: None,
) -> Mixed:
    """`count` sequences of `length` tokens; `seed` decides which windows of a text, and what the model writes.

    A part of ours that this machine or this model does not have is left out with a note, and its weight goes to the
    others; so does what a text of ours is too short for. Without `model` the sequences that it would write are missing,
    and the others are the same as with it. Raises BadInputError where more than half of the mix is not there, and for
    texts of the user's that are missing or too short.
    """
    import torch

    found, notes = _available(spec, tokenizer, model, count, length, seed, progress)
    if len(found) > count:
        found.sort(key=lambda source: -source.weight)  # stable: the first of equals stay
        notes += [f"{source.name} left out: there are only {count} sequences" for source in found[count:]]
        del found[count:]
    room = sum(source.limit for source in found)
    if room < count:
        raise BadInputError(
            f"The calibration text {spec} is too short: its parts hold {room} sequences of {length} tokens, needed are "
            f"{count}. Lower --calibration-tokens to {room * length}, or add files of your own."
        )
    weights = [source.weight for source in found]
    counts = apportion(weights, [source.limit for source in found], count)
    wanted = apportion(weights, [UNLIMITED] * len(found), count)
    for i, source in enumerate(found):
        if counts[i] < wanted[i]:
            notes.append(f"{source.name} is all of it, {counts[i]} sequences where its weight is {wanted[i]}")
        if model is None and source.name in sources.WRITTEN:
            notes.append(f"{source.name} is not in it: the model was not there to write it")
            counts[i] = 0
    used = [(source, n) for source, n in zip(found, counts, strict=True) if n]
    if not used:
        raise ValueError(f"mixed() needs the model for {spec}")
    drawn = [source.draw(n) for source, n in used]
    parts = tuple(
        TextPart(source.name, ids.numel(), text.sha256, text.license, text.note, source.name in sources.WRITTEN)
        for (source, _), (ids, text) in zip(used, drawn, strict=True)
    )
    rows = [drawn[part][0][place] for part, place in interleave([n for _, n in used])]
    return Mixed(torch.stack(rows), parts, tuple(notes))


def _available(
    spec: str, tokenizer: Any, model: Any, count: int, length: int, seed: int, progress: Progress
) -> tuple[list[_Source], list[str]]:
    """The parts that are there, and a note for each that is not."""
    found: list[_Source] = []
    missing: dict[str, str] = {}
    weights = parse(spec)
    for name, weight in weights.items():
        if name in sources.WRITTEN:
            if problem := sources.unable(name, tokenizer):
                missing[name] = problem
            else:
                found.append(_Source(name, weight, UNLIMITED, _writing(name, model, tokenizer, length, seed, progress)))
            continue
        try:
            found.append(_reading(name, weight, tokenizer, count, length, seed))
        except BadInputError as error:
            if name not in sources.NAMES:
                raise
            missing[name] = str(error).rstrip(".")
    if sum(weights[name] for name in missing) > 0.5:
        reasons = "; ".join(f"{name}: {why}" for name, why in missing.items())
        raise BadInputError(f"More than half of the calibration text {spec} is not here. {reasons}.")
    return found, [f"{name} left out: {why}" for name, why in missing.items()]


def _reading(name: str, weight: float, tokenizer: Any, count: int, length: int, seed: int) -> _Source:
    text = sources.read(name, "calibration", count * length)
    tokens = pack(text, tokenizer)
    check_tokens(tokens, tokenizer, text.name)
    windows = grid(tokens, length)
    if not len(windows):
        raise BadInputError(f"{text.name} is too short: found {len(tokens)} tokens, need one sequence of {length}.")

    def draw(sequences: int) -> tuple[torch.Tensor, Text]:
        if sequences > len(windows):
            raise BadInputError(
                f"{text.name} is too short for its weight: found {len(windows)} sequences of {length} tokens, need "
                f"{sequences}. Give more text, a smaller weight, or lower --calibration-tokens."
            )
        return windows[spread(len(windows), sequences, seed)], text

    return _Source(name, weight, len(windows) if name in sources.NAMES else UNLIMITED, draw)


def _writing(
    name: str, model: Any, tokenizer: Any, length: int, seed: int, progress: Progress
) -> Callable[[int], tuple[torch.Tensor, Text]]:
    return lambda sequences: sources.write(name, model, tokenizer, sequences, length, seed, progress)
