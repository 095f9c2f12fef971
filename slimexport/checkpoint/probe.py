"""`python -m slimexport.checkpoint.probe DIRECTORY IDS OUT THREADS [streamed]`: logits of a checkpoint in a fresh
process, loaded as users load it, or with one block after the other in memory."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path


def main(directory: str, ids: str, out: str, threads: str, how: str = "whole") -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from slimexport.checkpoint.load import load_weights, was_guessed

    torch.set_num_threads(int(threads))  # another split of the sums would round differently
    running: AbstractContextManager[None] = nullcontext()
    if how == "streamed":
        from slimexport.config import RunConfig
        from slimexport.loading import load_model
        from slimexport.pruning.stage import blocks_of

        guessed = was_guessed(Path(directory))
        loaded = load_model(RunConfig(model=directory, architecture="auto" if guessed else "known"), streamed=True)
        model, running = loaded.model, blocks_of(loaded, getattr(torch, loaded.source.stored_dtype)).running()
    else:
        model = load_weights(Path(directory))
    with torch.no_grad(), running:
        logits = model(load_file(ids)["ids"], use_cache=False).logits
    save_file({"logits": logits.contiguous()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
