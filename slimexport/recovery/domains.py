"""The texts of recovery, by domain: windows to train on, others to judge by, and which domain comes next.

One text makes a model better at that text and worse at the others. Several named ones are taken in turn by weight, and
the weights follow the domain that is worst (the idea of DRPruning, arXiv 2411.14055; the rule here is plainer).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.artifacts import TextPart, from_dict, sync
from slimexport.errors import BadInputError
from slimexport.texts import Text, mix, sources
from slimexport.texts.windows import check_tokens, grid, pack

if TYPE_CHECKING:
    import torch

HELD_OUT = 4  # windows of each domain that are judged by, at most
HELD_OUT_EVERY = 16  # one window of so many, where there are fewer
WRITTEN_TOKENS = 16_384  # that the model writes of a domain, at most: it takes far longer than reading
READ_TOKENS = 4_000_000  # of a text, at most
CHAT_WEIGHT = 0.15  # beside the parts of the default text, of a model that has a chat template
EPOCHS = 4  # more repetitions of a domain's text than that teach little (Muennighoff et al., arXiv 2305.16264)
STRENGTH = 2.0  # of the worst domain's pull
FURTHEST = 3.0  # a weight is multiplied or divided by at most

Told = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Domain:
    """`train` and `held_out` are int64 [windows, length]; the second is the end of the text."""

    part: TextPart
    weight: float
    train: torch.Tensor
    held_out: torch.Tensor

    @property
    def name(self) -> str:
        return self.part.name


def read_domains(
    spec: str,
    tokenizer: Any,
    teacher: Any,
    length: int,
    seed: int,
    progress: Told = lambda done, total, text: None,
    kept: Iterable[Domain] = (),
) -> tuple[tuple[Domain, ...], tuple[str, ...]]:
    """The parts of `spec` (a value of --calibration) as domains, and a note for each of ours that is not there. Of
    `default` answers in the model's chat template are one, where it has such. What is among the `kept` is not written
    by the model again; without a `teacher` nothing is, and those domains are missing.

    Raises BadInputError for texts of the user's that are missing, and for those that are too short.
    """
    weights = mix.parse(spec) if mix.is_mix(spec) else {spec: 1.0}
    if spec == "default" and not sources.unable("chat", tokenizer):
        weights["chat"] = CHAT_WEIGHT
    total = sum(weights.values())
    there = {domain.name: domain for domain in kept if domain.part.written}
    found: list[Domain] = []
    notes: list[str] = []
    unwritten = False
    for name, weight in weights.items():
        if name in there:
            found.append(there[name])
            continue
        if name in sources.WRITTEN and (problem := sources.unable(name, tokenizer)):
            notes.append(f"{name} left out: {problem}")
            continue
        if name in sources.WRITTEN and teacher is None:
            unwritten = True
            continue
        try:
            found.append(_domain(name, weight / total, tokenizer, teacher, length, seed, progress))
        except BadInputError as error:
            if name not in sources.NAMES or len(weights) == 1:
                raise
            notes.append(f"{name} left out: {str(error).rstrip('.')}")
    if not found and not unwritten:
        raise BadInputError(f"Nothing of the recovery text {spec} is here: {'; '.join(notes)}.")
    return tuple(found), tuple(notes)


def read_text(name: str, tokenizer: Any) -> tuple[Text, list[int]]:
    """What a domain that is not written by the model is cut from, and its tokens."""
    text = sources.read(name, "calibration", READ_TOKENS)
    tokens = pack(text, tokenizer)[:READ_TOKENS]
    check_tokens(tokens, tokenizer, text.name)
    return text, tokens


def _domain(name: str, weight: float, tokenizer: Any, teacher: Any, length: int, seed: int, progress: Told) -> Domain:
    if name in sources.WRITTEN:
        count = max(2, WRITTEN_TOKENS // length)
        windows, text = sources.write(name, teacher, tokenizer, count, length, seed, progress)
    else:
        text, tokens = read_text(name, tokenizer)
        windows = grid(tokens, length)
    if len(windows) < 2:
        raise BadInputError(
            f"{text.name} is too short to recover on: it holds {len(windows)} sequences of {length} tokens, needed are "
            "two, one of them to judge by. Give more text, or lower --recover-length."
        )
    aside = min(HELD_OUT, max(1, len(windows) // HELD_OUT_EVERY))
    part = TextPart(name, windows.numel(), text.sha256, text.license, text.note, name in sources.WRITTEN)
    return Domain(part, weight, windows[:-aside], windows[-aside:])


def save_domains(path: Path, domains: Sequence[Domain], about: Mapping[str, Any]) -> None:
    """A safetensors file, written aside and renamed, that `saved_domains` gives back with what is said `about` them."""
    from safetensors.torch import save_file

    named, windows = packed(domains)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.partial")
    save_file(windows, aside, metadata={"about": json.dumps({**about, "domains": named}, default=str)})
    sync(aside)
    aside.replace(path)


def saved_domains(path: Path) -> tuple[list[Domain], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        windows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return unpacked(about.pop("domains"), windows), about


def packed(domains: Sequence[Domain]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Plain data and tensors that `unpacked` makes the same domains of."""
    named = [{"weight": domain.weight, "part": asdict(domain.part)} for domain in domains]
    windows = {f"{i}.train": domain.train for i, domain in enumerate(domains)}
    return named, windows | {f"{i}.held_out": domain.held_out for i, domain in enumerate(domains)}


def unpacked(named: Sequence[Mapping[str, Any]], windows: Mapping[str, torch.Tensor]) -> list[Domain]:
    return [
        Domain(
            from_dict(TextPart, of["part"], "the domains of a text"), of["weight"],
            windows[f"{i}.train"].cpu(), windows[f"{i}.held_out"].cpu(),
        ) for i, of in enumerate(named)
    ]  # fmt: skip


class Turns:
    """Which window comes next: domains by weight, windows of one in an order that the seed draws anew every epoch."""

    def __init__(self, domains: Sequence[Domain], seed: int):
        self._domains, self._seed = domains, seed
        self.weights = {domain.name: domain.weight for domain in domains}
        self._credit = dict.fromkeys(self.weights, 0.0)
        self._taken = dict.fromkeys(self.weights, 0)
        self._orders: dict[tuple[int, int], list[int]] = {}

    def batch(self, sequences: int) -> torch.Tensor:
        """int64 [sequences, length]. Raises OutOfTextError where all text was used EPOCHS times."""
        import torch

        return torch.stack([self._next() for _ in range(sequences)])

    def _next(self) -> torch.Tensor:
        fresh = [(i, d) for i, d in enumerate(self._domains) if self._taken[d.name] < EPOCHS * len(d.train)]
        if not fresh:
            raise OutOfTextError
        total = sum(self.weights[domain.name] for _, domain in fresh)
        for _, domain in fresh:
            self._credit[domain.name] += self.weights[domain.name] / total
        index, domain = max(fresh, key=lambda at: self._credit[at[1].name])
        self._credit[domain.name] -= 1.0
        epoch, place = divmod(self._taken[domain.name], len(domain.train))
        self._taken[domain.name] += 1
        return domain.train[self._order(index, epoch)[place]]

    def _order(self, index: int, epoch: int) -> list[int]:
        import torch

        if (index, epoch) not in self._orders:
            generator = torch.Generator().manual_seed((self._seed * len(self._domains) + index) * EPOCHS + epoch)
            self._orders[index, epoch] = torch.randperm(len(self._domains[index].train), generator=generator).tolist()
        return self._orders[index, epoch]

    def follow(self, losses: Mapping[str, float]) -> None:
        """Gives domains more of the turns the more their loss is above the mean, relative to it."""
        mean = sum(losses.values()) / len(losses)
        if mean <= 0:
            return
        pulled = {
            d.name: d.weight * min(max(math.exp(STRENGTH * (losses[d.name] / mean - 1)), 1 / FURTHEST), FURTHEST)
            for d in self._domains
        }
        total = sum(pulled.values())
        self.weights = {name: weight / total for name, weight in pulled.items()}

    def state(self) -> dict[str, Any]:
        return {"weights": self.weights, "credit": self._credit, "taken": self._taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.weights, self._credit, self._taken = (dict(state[name]) for name in ("weights", "credit", "taken"))


class OutOfTextError(Exception):
    """Every domain was gone through EPOCHS times."""
