"""What `slimexport bench` measures, and what it asks of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from slimexport.errors import BadInputError
from slimexport.machine.cores import checked_threads
from slimexport.providers import parsed
from slimexport.verification.interleaved import Quantities, Timed


class Subject(Timed, Protocol):
    """What `subjects/` opens. `streamed_bytes` is what it reads for a token at least, where that is known."""

    name: str
    kind: str  # onnx | transformers | gguf
    precision: str
    vocabulary: int
    max_positions: int | None
    streamed_bytes: int | None


@dataclass(frozen=True)
class Settings:
    """TTFT of `prompts` tokens, `tokens` decoded after each of `pasts`, and of whole `batches`; `rounds` times.

    Raises BadInputError for numbers below 1 and for more threads than this process may use.
    """

    prompts: tuple[int, ...] = (32, 128, 512)
    pasts: tuple[int, ...] = (128, 1024)
    batches: tuple[int, ...] = ()
    tokens: int = 32
    rounds: int = 10
    threads: int | None = None
    provider: str = "cpu"
    provider_option: tuple[str, ...] = ()  # KEY=VALUE, for graphs
    huge_pages: bool = True  # as far as Linux has them: see machine/huge_pages.py
    seed: int = 0

    def __post_init__(self) -> None:
        if min((self.tokens, self.rounds, *self.prompts, *self.pasts, *self.batches)) < 1:
            raise BadInputError("Lengths, tokens, batches and rounds must be at least 1.")
        if self.batches and not self.pasts:
            raise BadInputError("Batches are measured after the first of the past lengths: name one.")
        checked_threads(self.threads)
        try:
            parsed(self.provider_option)
        except ValueError as error:
            raise BadInputError(f"{error}.") from error

    @property
    def resolved_threads(self) -> int:
        return checked_threads(self.threads)

    @property
    def provider_options(self) -> dict[str, str]:
        return parsed(self.provider_option)

    @property
    def longest(self) -> int:
        """Positions that a model needs."""
        return max((*self.prompts, *(past + self.tokens for past in self.pasts)), default=0)

    @property
    def quantities(self) -> Quantities:
        return Quantities(self.prompts, self.pasts, self.tokens, self.batches)
