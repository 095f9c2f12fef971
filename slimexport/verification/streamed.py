"""Perplexity and KL of the checkpoint beside the dense model, in torch and block by block: for what does not fit into
memory. Each model's weights are read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from slimexport.loading import resolve_device
from slimexport.pruning.forward import advance, first_states, working_copy
from slimexport.pruning.probe import in_float32, output_logits
from slimexport.pruning.stage import blocks_of, settings_of
from slimexport.pruning.states import HiddenStates, Room
from slimexport.verification.perplexity import Accuracy, Said, compared, windows_of

if TYPE_CHECKING:
    from slimexport.config import RunConfig
    from slimexport.loading import LoadedModel

Progress = Callable[[int, int], None]
"""Called with blocks done and blocks in all."""


@torch.no_grad()
def streamed_accuracy(
    shrunk: LoadedModel,
    dense: LoadedModel | None,
    input_ids: NDArray[np.int64],
    config: RunConfig,
    room: Room = Room(),
    progress: Progress | None = None,
) -> Accuracy:
    """As `perplexity.accuracy` of two decoders: the same windows, definitions and sums, in float32.

    Args:
        input_ids: int64 [n].
        room: where hidden states live; those of both models are there together.
    """
    windows = list(windows_of(np.ascontiguousarray(input_ids, np.int64), config.eval_window))
    models = [model for model in (shrunk, dense) if model is not None]
    blocks = sum(len(model.architecture.blocks) for model in models)
    done = 0

    def passed() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, blocks)

    said = [_logits(model, windows, config, room, passed) for model in models]

    def pairs() -> Iterator[Said]:
        for part in windows:
            logits = [next(of) for of in said]
            yield Said(part, logits[0], logits[1] if dense is not None else None)

    return compared(pairs(), config.eval_window)


def _logits(
    model: LoadedModel, windows: list[NDArray[np.int64]], config: RunConfig, room: Room, passed: Callable[[], None]
) -> Iterator[NDArray[np.float32]]:
    """Of every window in turn [w - 1, vocab]; all blocks are passed before the first."""
    device = resolve_device(config.device)
    stored = getattr(torch, model.source.stored_dtype)
    # As full verification's, whatever pruning computed in.
    settings = replace(settings_of(model.model, config, device, stored, room), dtype=torch.float32)
    # No padding: a last window that is shorter goes apart.
    groups = [[w for w in windows if len(w) == length] for length in dict.fromkeys(map(len, windows))]
    ids = [torch.from_numpy(np.stack(group)) for group in groups]
    streams = [first_states(model.model, model.architecture, of, settings) for of in ids]
    source = blocks_of(model, stored, device)
    for index in range(len(source)):
        work = working_copy(source.load(index), settings)
        for states, arguments in streams:
            advance(states, index, work, arguments)
        source.release(index)
        passed()
    head = output_logits(model.model, model.architecture, device, every=1)
    blocks = list(model.model.get_submodule(model.architecture.family.blocks))
    return _each([states for states, _ in streams], head, in_float32(model.model, blocks))


def _each(
    streams: list[HiddenStates],
    head: Callable[[torch.Tensor], torch.Tensor],
    converted: AbstractContextManager[None],  # once for all sequences
) -> Iterator[NDArray[np.float32]]:
    with torch.no_grad(), converted:
        for states in streams:
            for batch in states:
                for sequence in batch.split(1):
                    logits: NDArray[np.float32] = head(sequence)[0, :-1].cpu().numpy()
                    yield logits
