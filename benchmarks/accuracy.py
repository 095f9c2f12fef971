"""Perplexity, KL divergence and top-1 agreement of torch models, fast enough for many of them on two cores.

Same definition as the product's `slimexport.verification.perplexity`: windows without overlap, the first token of a
window is context only, a last window of fewer than two tokens is dropped. Two things make it quick. Windows run in
batches through the decoder alone, so that no logits of a whole batch are ever held. And the dense model runs once per
text: its final hidden states are kept ([60,000, 576] float32 are 138 MB, its logits would be 11.8 GB), and the dense
logits come back from them window by window, at the price of one lm_head.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from slimexport.errors import BadInputError

# The product's own arithmetic, so that a number from here and one from a report differ by nothing but the forward pass.
from slimexport.verification.perplexity import Accuracy, _compare, _nll, _one_dimensional, windows_of

WINDOW = 512
BATCH = 4  # windows in one forward pass: more was no faster on two cores

Progress = Callable[[int, int], None]
"""Called with tokens done and tokens in all."""


@dataclass(frozen=True)
class Reference:
    """What is kept of the dense model on one text: enough for KL divergence and agreement of any other model.

    `ids` int64 [tokens], without a dropped last token; `hidden` float32 [tokens, hidden size], after the final norm;
    `nll` float64 [windows], in nats, summed over the scored tokens of each window; `head` is the dense lm_head.
    """

    ids: torch.Tensor
    hidden: torch.Tensor
    nll: torch.Tensor
    window: int
    head: Any

    @property
    def scored(self) -> int:
        return len(self.ids) - len(self.nll)

    @property
    def perplexity(self) -> float:
        return math.exp(float(self.nll.sum()) / self.scored)

    def save(self, path: Path) -> None:
        """Writes one safetensors file, without the lm_head: that belongs to the model."""
        tensors = {"ids": self.ids, "hidden": self.hidden, "nll": self.nll}
        save_file(tensors, str(path), metadata={"reference": json.dumps({"window": self.window})})

    @classmethod
    def load(cls, path: Path, model: Any) -> Reference:
        """`model` is the same dense model (its lm_head is used); raises BadInputError where its size is another."""
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            window = json.loads(file.metadata()["reference"])["window"]
        head = model.get_output_embeddings()
        if head.weight.shape[1] != tensors["hidden"].shape[1]:
            raise BadInputError(f"{path} was made with another model than the one whose lm_head is given.")
        return cls(window=window, head=head, **tensors)


@torch.inference_mode()
def dense_reference(
    model: Any, ids: torch.Tensor, window: int = WINDOW, batch: int = BATCH, progress: Progress | None = None
) -> Reference:
    """Runs the dense model once over `ids` int64 [tokens] and keeps its final hidden states.

    Raises BadInputError for fewer than two tokens, and for a model whose logits are not lm_head(final hidden state).
    """
    text = _one_dimensional(torch.as_tensor(ids).cpu().numpy())
    head = _checked_head(model, text)
    kept, nll = [], []
    with _Rows() as rows:
        for part, hidden in _hidden_states(model, text, window, batch, progress):
            kept.append(hidden.float().cpu())
            logits = _logits(head, hidden[:-1])
            nll.append(rows.sums(_nll_only, logits, part[1:])[0])
    used = sum(map(len, kept))
    return Reference(torch.tensor(text[:used]), torch.cat(kept), torch.tensor(nll, dtype=torch.float64), window, head)


def kept_reference(path: Path, model: Any, ids: torch.Tensor, batch: int = BATCH) -> Reference:
    """`dense_reference`, made once: what is in the file `path` is taken from there."""
    if not path.is_file():
        started = time.monotonic()
        dense_reference(model, ids, batch=batch).save(path)
        print(f"{path.stem}: {time.monotonic() - started:.0f} s", flush=True)
    return Reference.load(path, model)


@torch.inference_mode()
def measure(
    model: Any,
    ids: torch.Tensor,
    window: int = WINDOW,
    dense: Reference | None = None,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> Accuracy:
    """Sums per window of any causal language model over `ids` int64 [tokens], beside `dense` where given.

    Memory is a batch's activations and the logits of one window (two with `dense`). Raises BadInputError for fewer
    than two tokens, for a model whose logits are not lm_head(final hidden state), and for a `dense` of another text,
    window or vocabulary.
    """
    text = _one_dimensional(torch.as_tensor(ids).cpu().numpy())
    head = _checked_head(model, text)
    if dense is not None:
        _check_reference(dense, head, text, window)
    sums: list[tuple[int, float, float, float, int]] = []
    start = 0
    with _Rows() as rows:
        for part, hidden in _hidden_states(model, text, window, batch, progress):
            targets = part[1:]
            if dense is None:
                sums.append((len(targets), *rows.sums(_nll_only, _logits(head, hidden[:-1]), targets)))
            elif hidden.is_cuda:
                kept = dense.hidden[start : start + len(targets)].to(hidden.device)
                sums.append((len(targets), *beside_on_device(head(hidden[:-1]), dense.head(kept), targets)))
            else:
                kept = dense.hidden[start : start + len(targets)]
                sums.append(
                    (len(targets), *rows.sums(_beside, _logits(head, hidden[:-1]), _logits(dense.head, kept), targets))
                )
            start += len(part)
    tokens, nll, dense_nll, kl, agreements = (np.array(column) for column in zip(*sums, strict=True))
    if dense is None:
        return Accuracy(window, tokens, nll, None, None, None)
    return Accuracy(window, tokens, nll, dense_nll, kl, agreements)


def evaluate(
    model: Any,
    ids: torch.Tensor,
    window: int = WINDOW,
    dense: Reference | None = None,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The figures of `measure` as plain data.

    Always `perplexity`, `nll` (nats/token) and `scored`; with `dense` also `perplexity_dense`, `x_dense` and its 95 %
    interval (paired by window; None for a single window), `kl` (KL(dense || model), nats/token) and `top1_agreement`.
    """
    found = measure(model, ids, window, dense, batch, progress)
    figures: dict[str, Any] = {"perplexity": found.perplexity, "nll": found.mean_nll, "scored": found.scored}
    if found.baseline_nll is None or found.kl is None or found.agreements is None:
        return figures
    dense_nll = float(found.baseline_nll.sum()) / found.scored
    return figures | {
        "perplexity_dense": math.exp(dense_nll),
        "x_dense": math.exp(found.mean_nll - dense_nll),
        "x_dense_interval": found.ratio_interval(),
        "kl": float(found.kl.sum()) / found.scored,
        "top1_agreement": float(found.agreements.sum()) / found.scored,
    }


# --------------------------------------------------------------------------------------------------- hidden states


def _hidden_states(
    model: Any, text: NDArray[np.int64], window: int, batch: int, progress: Progress | None
) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
    """(ids [w], final hidden states [w, hidden size]) of every window, in order, `batch` windows a forward pass."""
    parts = list(windows_of(text, window))
    full = sum(len(part) == window for part in parts)
    groups = [parts[i : min(i + batch, full)] for i in range(0, full, batch)]
    groups += [[part] for part in parts[full:]]  # the last one is shorter: padding would cost more than it saves
    decoder, done = _decoder(model), 0
    for group in groups:
        ids = torch.from_numpy(np.stack(group)).to(model.device)
        yield from zip(group, decoder(input_ids=ids, use_cache=False).last_hidden_state, strict=True)
        done += ids.numel()
        if progress:
            progress(done, len(text))


def _decoder(model: Any) -> Any:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if decoder is not None and decoder is not model else model.model


def _logits(head: Any, hidden: torch.Tensor) -> NDArray[np.float32]:
    """float32 [t, vocabulary] of hidden states [t, hidden size]."""
    logits: NDArray[np.float32] = head(hidden.to(head.weight)).float().cpu().numpy()
    return logits


def _checked_head(model: Any, text: NDArray[np.int64]) -> Any:
    """The lm_head, once it is sure that nothing stands between it and the logits (soft-capping, a scale)."""
    head = model.get_output_embeddings()
    ids = torch.from_numpy(text[:8])[None].to(model.device)
    hidden = _decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    here, there = head(hidden.to(head.weight)).float(), model(ids, use_cache=False).logits.float()
    if not torch.allclose(here, there, rtol=1e-3, atol=1e-3 * float(there.abs().max())):
        raise BadInputError(f"{type(model).__name__} does more than lm_head with its final hidden states.")
    return head


def _check_reference(dense: Reference, head: Any, text: NDArray[np.int64], window: int) -> None:
    if dense.window != window or not np.array_equal(dense.ids.numpy(), text[: len(dense.ids)]):
        raise BadInputError("The dense reference was made on another text or with another window.")
    if len(text) - len(dense.ids) > 1:
        raise BadInputError(f"The dense reference ends after {len(dense.ids)} of {len(text)} tokens.")
    if dense.head.weight.shape[0] != head.weight.shape[0]:
        raise BadInputError("The dense reference has another vocabulary.")


# ------------------------------------------------------------------------------------------------------ vocabulary


def _nll_only(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> tuple[float, float, float, int]:
    return _nll(logits, targets), 0.0, 0.0, 0


def _beside(
    logits: NDArray[np.float32], dense: NDArray[np.float32], targets: NDArray[np.int64]
) -> tuple[float, float, float, int]:
    return _compare(logits, dense, targets)


def beside_on_device(
    logits: torch.Tensor, dense: torch.Tensor, targets: NDArray[np.int64]
) -> tuple[float, float, float, int]:
    """What `_compare` computes, where the logits are: a GPU holds and adds them faster than a CPU reads them.

    float32 softmaxes, summed in float64. Heads and hidden states in float32.
    """
    wanted = torch.from_numpy(targets).to(logits.device)[:, None]
    ours, theirs = (z.float().log_softmax(-1) for z in (logits, dense))
    nll, dense_nll = (float(-p.gather(1, wanted).sum(dtype=torch.float64)) for p in (ours, theirs))
    divergence = (theirs.exp() * (theirs - ours)).sum(-1, dtype=torch.float64).clamp(min=0).sum()
    return nll, dense_nll, float(divergence), int((logits.argmax(-1) == dense.argmax(-1)).sum())


class _Rows:
    """Splits the softmax over the vocabulary by rows: numpy works in one thread each, in pieces that fit the cache.

    torch's own threads meet at a barrier in every operation, and stall wherever another process has a core.
    """

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()

    def __enter__(self) -> _Rows:
        self.pool = ThreadPoolExecutor(self.threads)
        return self

    def __exit__(self, *_: Any) -> None:
        self.pool.shutdown()

    def sums(self, of: Callable[..., tuple[float, float, float, int]], *arrays: Any) -> tuple[float, float, float, int]:
        """Sums what `of` returns for the rows of `arrays`, each [t, ...]."""
        edges = np.linspace(0, len(arrays[0]), self.threads + 1).astype(int).tolist()
        pieces = [slice(a, b) for a, b in pairwise(edges) if b > a]
        found = self.pool.map(lambda piece: of(*(array[piece] for array in arrays)), pieces)
        nll, dense_nll, kl, agreements = zip(*found, strict=True)
        return sum(nll), sum(dense_nll), sum(kl), sum(agreements)
