"""A supernet: of every block some sizes of its heads and of its channels, each with its compensated output matrix, all
made in one pass over the dense model and kept on disk (as in Týr-the-Pruner, arXiv 2503.09657).

Any choice of one size for each part puts a model together without pruning anything: a plan is tried by passing a few
windows of text through the dense blocks with the chosen matrices in place. The matrices were compensated on dense
inputs, so that the KL is that of a model pruned in one go, block by block apart; it ranks plans, and the plan that is
chosen is then pruned properly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from slimexport.architectures.base import Architecture
from slimexport.artifacts import BlockSizes, read_json, remove, write_json
from slimexport.pruning.blocks import BlockSource
from slimexport.pruning.forward import Settings, output, working_copy
from slimexport.pruning.grid import Grid
from slimexport.pruning.probe import Cut, divergence, replaced
from slimexport.pruning.sensitivity import Curve
from slimexport.ranks import Message

INDEX = "index.json"  # written last: a supernet without it is half a one


class SupernetWriter:
    """Writes `NNN.safetensors` for every block, as a `sensitivity.CurveKeeper`; `finish` makes the supernet count."""

    def __init__(self, directory: Path, stored: torch.dtype):
        """`stored`: the precision of the matrices on disk, that of the checkpoint."""
        remove(directory)
        directory.mkdir(parents=True)
        self._directory, self._stored = directory, stored
        self._grids: list[Grid] = []

    def __call__(self, block: int, heads: Curve, channels: Curve) -> None:
        from safetensors.torch import save_file

        tensors = {}
        for curve in (heads, channels):
            for size in curve.searched:
                if size in curve.cuts:  # and not the dense one
                    W, columns = _names(size)
                    tensors[W] = curve.cuts[size].W.to("cpu", self._stored).contiguous()
                    tensors[columns] = curve.cuts[size].columns.cpu()
        save_file(tensors, _file(self._directory, block))
        self._grids.append(Grid(tuple(heads.searched), tuple(channels.searched)))

    def finish(self, identity: Mapping[str, str]) -> None:
        blocks = [{"heads": g.heads, "channels": g.channels} for g in self._grids]
        write_json(self._directory / INDEX, {"identity": dict(identity), "blocks": blocks})


def read_grids(directory: Path, identity: Mapping[str, str]) -> tuple[Grid, ...] | None:
    """The sizes in the supernet of `directory`; None where there is none, half a one, or one of something else."""
    if not (directory / INDEX).is_file():
        return None
    index = read_json(directory / INDEX)
    if index["identity"] != dict(identity):
        return None
    return tuple(
        Grid(tuple((groups, per_group) for groups, per_group in block["heads"]), tuple(block["channels"]))
        for block in index["blocks"]
    )


class Supernet:
    """Puts plans together from the matrices in `directory`, and compares their output with the dense model's."""

    def __init__(
        self,
        directory: Path,
        *,
        source: BlockSource,
        probes: torch.Tensor,
        arguments: Callable[[int], dict[str, Any]],
        logits: Callable[[torch.Tensor], torch.Tensor],
        architecture: Architecture,
        settings: Settings,
    ):
        """`probes` [sequences, length, hidden]: hidden states before block 0; `arguments`: of each block's forward."""
        self._directory, self._source, self._settings = directory, source, settings
        self._probes, self._arguments, self._logits = probes, arguments, logits
        self._architecture = architecture
        self._dense: torch.Tensor | None = None  # log probabilities of the dense model

    def evaluate(self, plans: Sequence[tuple[BlockSizes, ...]]) -> list[float]:
        """KL(dense || assembled) of each plan, mean over the scored positions, nats per token.

        All plans move together, so that each block's weights are read and converted once; those that begin alike
        share the passes through the blocks where they do. The model is left as it is.
        """
        self._settings.ranks.told(lambda: Message({"plans": [[astuple(block) for block in plan] for plan in plans]}))
        return self._share(plans)

    def assist(self) -> None:
        """What the other ranks do while the first one searches, until that has its `end`."""
        while (said := self._settings.ranks.told(Message).values["plans"]) is not None:
            self._share([tuple(BlockSizes(*block) for block in plan) for plan in said])

    def end(self) -> None:
        self._settings.ranks.told(lambda: Message({"plans": None}))

    def _share(self, plans: Sequence[tuple[BlockSizes, ...]]) -> list[float]:
        """Plans are dealt out to the ranks, one by one."""
        ranks = self._settings.ranks
        found = torch.zeros(len(plans), dtype=torch.float64)
        if own := plans[ranks.rank :: ranks.size]:
            found[ranks.rank :: ranks.size] = torch.tensor(self._evaluated(own), dtype=torch.float64)
        ranks.add_up([found])
        return found.tolist()

    @torch.no_grad()
    def _evaluated(self, plans: Sequence[tuple[BlockSizes, ...]]) -> list[float]:
        if self._dense is None:
            dense = self._architecture.blocks
            self._dense = self._logits(self._pass([dense])[dense]).log_softmax(-1)
        ends = self._pass(plans)
        found = {plan: divergence(self._dense, self._logits(states)) for plan, states in ends.items()}
        return [found[plan] for plan in plans]

    def _pass(self, plans: Sequence[tuple[BlockSizes, ...]]) -> dict[tuple[BlockSizes, ...], torch.Tensor]:
        """Each plan's hidden states after the last block."""
        from safetensors import safe_open

        states: dict[tuple[BlockSizes, ...], torch.Tensor] = {(): self._probes}
        for index in range(len(self._source)):
            work = working_copy(self._source.load(index), self._settings)
            after: dict[tuple[BlockSizes, ...], torch.Tensor] = {}
            with safe_open(_file(self._directory, index), framework="pt") as tensors:
                for plan in plans:
                    begin = plan[: index + 1]
                    if begin not in after:
                        after[begin] = self._through(work, tensors, index, begin[-1], states[begin[:-1]])
            self._source.release(index)
            states = after
        return states

    def _through(self, work: Any, tensors: Any, index: int, sizes: BlockSizes, states: torch.Tensor) -> torch.Tensor:
        dense, family = self._architecture.blocks[index], self._architecture.family
        heads, whole = (sizes.kv_groups, sizes.heads_per_group), (dense.kv_groups, dense.heads_per_group)
        of_heads = None if heads == whole else _read(tensors, heads)
        of_channels = None if sizes.channels == dense.channels else _read(tensors, sizes.channels)
        with (
            replaced(work, family.attention_output, of_heads),
            replaced(work, family.ffn_output, of_channels),
        ):
            return output(work(states, **self._arguments(index)))


def _file(directory: Path, block: int) -> Path:
    return directory / f"{block:03d}.safetensors"


def _names(size: Any) -> tuple[str, str]:
    """(3, 2) -> heads.3x2.W, heads.3x2.columns; 1024 -> channels.1024.W, channels.1024.columns."""
    name = f"channels.{size}" if isinstance(size, int) else f"heads.{size[0]}x{size[1]}"
    return f"{name}.W", f"{name}.columns"


def _read(tensors: Any, size: Any) -> Cut:
    W, columns = _names(size)
    return Cut(tensors.get_tensor(columns), tensors.get_tensor(W))
