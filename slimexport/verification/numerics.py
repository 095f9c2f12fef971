"""Does the graph compute what the torch model computes? Logits of prefill, decode and chunk, and greedy tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from slimexport.errors import BadInputError, NotReproducedError
from slimexport.runtime import Decoder
from slimexport.runtime.base import precision_of
from slimexport.verification.differences import Found, GraphRun, Tolerance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_TOKENS = 48  # of each random prompt: 35 for the prefill, 1 for the decode step, 12 for the chunk
# A share of positions of which nothing is expected in half precision, and where two graphs are compared, one with what
# stands for the other's weights. Among random tokens there is one now and then that becomes an attention sink by a
# hair: what is rounded otherwise before it decides, and logits after it are anything (SmolLM2-135M, pruned: by 0.01
# where both compute in float32, 50 times what they differ by elsewhere, and by 10 with activations in 8 bits).
STRAYS = 0.02
SHORTEST_PROMPT = 4  # 1 for the prefill, 1 for the decode step, 2 for the chunk


# The spread is the standard deviation over the vocabulary, averaged over positions (2.6 for SmolLM2-135M). There the
# float32 graph differs by 6e-5 at most and 4e-6 in the mean; torch in float16 differs from torch in float32 by 0.06
# and 0.005, in bfloat16 by 0.7 and 0.04 (the largest at the first token, whose residual is huge). A bound is a few
# times that in half precision and thirty times that in float32; a wrong block gives differences of the order of 1.
# The mean is the sharper test in half precision, where single logits stray. Of quantised graphs this is about
# activations in 8 bits alone, which move SmolLM2's logits on random tokens by 0.1 in the mean and single ones by 2.5:
# what is wrong in one place is seen without that rounding (targets/onnx.py), and what it costs on text is measured.
TOLERANCES = {
    "fp32": Tolerance(2e-3, 2e-4),
    "fp16": Tolerance(0.25, 0.02),
    "bf16": Tolerance(2.0, 0.15),
    **dict.fromkeys(("int8", "int4", "int4-mixed"), Tolerance(10.0, 0.5)),
}


def check_export(
    decoder: Decoder,
    model: PreTrainedModel | Decoder,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    steps: int = 64,
    light: bool = False,
) -> dict[str, Any]:
    """`compare_export`, and NotReproducedError where it found a difference beyond tolerance."""
    result = compare_export(decoder, model, prompts=prompts, seed=seed, steps=steps, light=light)
    if result["failure"] is not None:
        raise NotReproducedError(f"{decoder.path} does not compute what the model computes: {result['failure']}")
    return result


def compare_export(
    decoder: Decoder,
    model: PreTrainedModel | Decoder,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    steps: int = 64,
    light: bool = False,
) -> dict[str, Any]:
    """Runs graph and torch model on the same token ids and says how far they are apart. Of a quantised graph `model` is
    the graph with the numbers that its weights stand for: what is written of torch here holds for that then.

    For each prompt (two of random ids by default) the graph takes most of it as prefill, one token as decode step, the
    rest as a chunk, and then decodes `steps` tokens greedily, one by one, on its KV cache (fewer if the model's
    positions end). Where it can give the last token's logits alone it is asked for those too, of a padded batch. Torch
    then sees prompt and tokens in *one* uncached forward: the definition of what each of those calls should have given,
    without trusting torch's own cache, and 20 times cheaper than decoding. Each greedy token must be torch's choice
    too, which makes both sequences equal by induction; or it is a *tie*, a token whose torch logit is within the
    tolerance of the best. The steps after a tie are checked on the graph's token.

    `light`: the first prompt alone, and no greedy tokens, so that the graph's weights are read three times and no more.

    Of a decoder with `strays`, and of `STRAYS` in half precision or beside another graph, that share of positions may
    be anything; they are listed, and count for nothing else.

    The tolerance (`TOLERANCES`) is the coarser of the graph's precision and the model's dtype, times the spread of
    torch's logits. Returns plain data; `failure` is None or says which step differs and by how much. Raises
    BadInputError for prompts that are too short or too long.
    """
    if prompts is None:
        vocabulary = _vocabulary(model)
        prompts = np.random.default_rng(seed).integers(0, vocabulary, (2, _prompt_length(decoder))).tolist()
    if light:
        prompts, steps = prompts[:1], 0
    precision = _precision(decoder, model)
    limits = TOLERANCES[precision]
    share = max(decoder.strays, STRAYS if isinstance(model, Decoder) or precision != "fp32" else 0.0)
    found, failure = Found(limits, share), None
    for number, prompt in enumerate(prompts):
        if len(prompt) < SHORTEST_PROMPT:
            raise BadInputError(f"Prompt {number} of the check has {len(prompt)} tokens, it needs {SHORTEST_PROMPT}.")
        room = _room(decoder, len(prompt))
        try:
            run = _run_graph(decoder, np.asarray(prompt, np.int64), min(steps, room), last=not light)
        except BadInputError as error:  # the tokens are valid, so it is the graph that cannot do this
            failure = str(error)
            break
        found.add(number, len(prompt), run, _expected_logits(model, run.ids))
    return {
        "precision": precision,
        "prompts": len(prompts),
        "seed": seed,
        **found.result(),
        "failure": failure or found.failure(precision),
    }


def _run_graph(decoder: Decoder, prompt: NDArray[np.int64], steps: int, *, last: bool) -> GraphRun:
    size, chunk = len(prompt), max(2, len(prompt) // 4)
    one = size - chunk - 1
    parts = {"prefill": slice(0, one), "decode": slice(one, one + 1), "chunk": slice(one + 1, size)}
    rows: list[NDArray[np.float32]] = []
    # As it is used: in memory for the whole sequence, where the graph can have that. The other way, a cache that every
    # call makes anew, is what the accuracy on text is measured without and `last` with.
    past = decoder.room(1, size + steps)
    for part in parts.values():
        got, past = decoder.forward(prompt[None, part], past)
        rows.append(got[0])
    chosen = []
    for _ in range(steps):
        chosen.append(int(rows[-1][-1].argmax()))
        if len(chosen) < steps:
            got, past = decoder.forward(np.array([chosen[-1:]], np.int64), past)
            rows.append(got[0])
    # The first choice is made on the chunk's last logits, which are compared as the chunk's.
    parts["greedy"] = slice(size, None)
    ids = np.concatenate([prompt, np.array(chosen[:-1], np.int64)])
    of_last = _last(decoder, prompt, one) if last else {}
    return GraphRun(ids, np.concatenate(rows), np.array(chosen, np.int64), parts, of_last)


def _last(decoder: Decoder, prompt: NDArray[np.int64], shorter: int) -> dict[int, NDArray[np.float32]]:
    """Of the prompt and, beside it in one batch, of its first `shorter` tokens and padding; asked for alone where the
    decoder gives those."""
    if decoder.fixed_batch not in (None, 2):
        return {len(prompt) - 1: decoder.last_logits(prompt[None])[0][0]}
    both, mask = np.stack([prompt, prompt]), np.ones((2, len(prompt)), np.int64)
    mask[1, shorter:] = 0
    if decoder.last_only:
        rows, _ = decoder.last_logits(both, None, mask)
        return {len(prompt) - 1: rows[0], shorter - 1: rows[1]}
    logits, _ = decoder.forward(both, None, mask)
    return {len(prompt) - 1: logits[0, -1], shorter - 1: logits[1, shorter - 1]}


@torch.no_grad()
def _expected_logits(model: PreTrainedModel | Decoder, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """float32 [ids, vocab] of one uncached forward."""
    if isinstance(model, Decoder):
        return model.forward(ids[None])[0][0]
    logits = model(torch.from_numpy(ids)[None].to(model.device), use_cache=False).logits
    array: NDArray[np.float32] = logits[0].float().cpu().numpy()
    return array


def _vocabulary(model: PreTrainedModel | Decoder) -> int:
    if isinstance(model, Decoder):
        assert model.vocab_size is not None, "our own graph states it"
        return model.vocab_size
    return int(model.config.get_text_config().vocab_size)


def _precision(decoder: Decoder, model: PreTrainedModel | Decoder) -> str:
    """The coarser of the graph's precision and the model's."""
    graph = decoder.precision
    if isinstance(model, Decoder):
        return graph
    return max(graph, precision_of(model.dtype), key=list(TOLERANCES).index)


def _prompt_length(decoder: Decoder) -> int:
    return min(PROMPT_TOKENS, (decoder.max_positions or PROMPT_TOKENS * 2) // 2)


def _room(decoder: Decoder, prompt: int) -> int:
    """How many tokens can be decoded after the prompt: the last one chosen is not fed."""
    if decoder.max_positions is None:
        return 1_000_000
    if prompt > decoder.max_positions:
        raise BadInputError(
            f"A prompt of {prompt} tokens is longer than the model's {decoder.max_positions} positions."
        )
    return decoder.max_positions - prompt + 1
