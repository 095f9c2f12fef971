"""What the first rank sends to others that cannot read its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from slimexport.artifacts import sha256_tree
from slimexport.ranks import ALONE, Message, shared


class Two:
    """A rank of two, which hears what the other one said before."""

    size = 2

    def __init__(self, rank: int, said: list[Message]):
        self.rank, self._said = rank, said

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        raise AssertionError("nothing is added up")

    def told(self, make: Callable[[], Message]) -> Message:
        if self.rank == 0:
            self._said.append(make())
        return self._said[-1]


def test_files_are_sent_to_where_they_are_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "a.json").write_text('{"a": 1}')
    (source / "inner" / "b.bin").write_bytes(bytes(range(256)) * 9)
    said: list[Message] = []
    assert shared(ALONE, source, tmp_path / "aside") == source
    assert shared(Two(0, said), source, tmp_path / "aside") == source
    assert not (tmp_path / "aside").exists()
    assert shared(Two(1, said), None, tmp_path / "copy") == tmp_path / "copy"
    assert sha256_tree(tmp_path / "copy") == sha256_tree(source)
