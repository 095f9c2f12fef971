"""What a traced graph costs: families that mobius does not build, beside a Llama of the same sizes that it does.

    python benchmarks/graphs.py [--only falcon,glm] [--rounds 9]

Random models of a few blocks, wide enough that weights decide. Both graphs decode and read prompts in turn in one
process; the factor is the median of each turn's ratio over that of the bytes (for prompts, the FLOPs) that the two
models need by their sizes: 1 is as fast as mobius' graph. `slimexport architectures` shows the factor of decoding.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import load_rows, save_rows

from slimexport.architectures import architecture_of, registry
from slimexport.architectures.overview import GRAPHS
from slimexport.runtime import OnnxDecoder
from slimexport.targets import registry as targets
from slimexport.targets.base import ExportOptions
from slimexport.targets.builders import mobius
from slimexport.testing import tiny_config, tiny_model, tiny_tokenizer

WIDTH, HEADS, GROUPS, HEAD_DIM, CHANNELS = 768, 12, 4, 64, 2048
LATENT = {"q_lora_rank": 384, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
          "num_key_value_heads": HEADS, "head_dim": 32}  # fmt: skip
PROMPT, DECODED = 256, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="families, joined by commas; default: all that are traced")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    traced = [n for n in registry.names() if n not in mobius.FAMILIES and not registry.get(n).no_trace]
    rows = load_rows(GRAPHS)
    with tempfile.TemporaryDirectory() as place:
        reference = exported("llama", Path(place, "llama"), options.threads)
        for family in options.only.split(",") if options.only else traced:
            try:
                other = exported(family, Path(place, family), options.threads)
                row = {"family": family, **factors(other, reference, options.rounds), "threads": options.threads}
            except Exception as error:
                print(f"{family}: {type(error).__name__}: {error}", flush=True)
                continue
            print(row, flush=True)
            rows = sorted([r for r in rows if r["family"] != family] + [row], key=lambda r: r["family"])
            save_rows(GRAPHS, rows)


def exported(family: str, place: Path, threads: int) -> tuple[OnnxDecoder, Any]:
    """The graph of a random model, and what its sizes say of bytes and FLOPs."""
    known = registry.get(family)
    changes = {
        "hidden_size": WIDTH, known.query_heads_field: HEADS, known.channels_field: CHANNELS, "sliding_window": 4096,
    }  # fmt: skip
    plain = tiny_config(family).to_dict()
    if known.kv_groups_field in plain:
        changes[known.kv_groups_field] = GROUPS
    if "max_position_embeddings" in plain or "n_positions" in plain:
        changes["max_position_embeddings"] = 1024
    for name, size in (("head_dim", HEAD_DIM), ("word_embed_proj_dim", WIDTH)):
        if name in plain:
            changes[name] = size
    if known.head_axes is not None:
        changes |= LATENT
    if "sliding_window" not in plain:
        del changes["sliding_window"]
    model = tiny_model(tiny_config(family, **changes))
    for parameter in model.parameters():
        parameter.data *= 0.1  # noise of this width would overflow in some families
    place.mkdir()
    targets.get("onnx").export(model, tiny_tokenizer(), place, ExportOptions())
    return OnnxDecoder(place, threads=threads), architecture_of(model.config, family).estimates(4)


def factors(other: tuple[OnnxDecoder, Any], reference: tuple[OnnxDecoder, Any], rounds: int) -> dict[str, float]:
    prompt = np.arange(PROMPT, dtype=np.int64) % 200 + 3
    decoding, reading = [], []
    for turn in range(-1, rounds):
        timed = {}
        for which in (0, 1) if turn % 2 else (1, 0):
            timed[which] = (other, reference)[which][0].timed_greedy(prompt, DECODED)
        if turn >= 0:  # the first warms up
            first, second = (statistics.median(timed[which].token_seconds) for which in (0, 1))
            decoding.append(first / second)
            reading.append(timed[0].ttft_seconds / timed[1].ttft_seconds)
    ours, theirs = other[1], reference[1]
    context = PROMPT + DECODED / 2
    needed = [e.decode_bytes_per_token + context * e.kv_cache_bytes_per_token for e in (ours, theirs)]
    flops = ours.prefill_flops_per_token / theirs.prefill_flops_per_token
    return {
        "decode": round(statistics.median(decoding) * needed[1] / needed[0], 2),
        "prefill": round(statistics.median(reading) / flops, 2),
    }


if __name__ == "__main__":
    main()
