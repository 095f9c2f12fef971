"""`python -m slimexport.checkpoint.probe DIRECTORY IDS OUT THREADS`: logits of a checkpoint in a fresh process."""

from __future__ import annotations

import sys
from pathlib import Path


def main(directory: str, ids: str, out: str, threads: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from slimexport.checkpoint.load import load_weights

    torch.set_num_threads(int(threads))  # another split of the sums would round differently
    model = load_weights(Path(directory))
    with torch.no_grad():
        logits = model(load_file(ids)["ids"], use_cache=False).logits
    save_file({"logits": logits.contiguous()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
