"""A decoder of the runtime as lm-eval wants a model: log-likelihoods of continuations, and greedy text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from slimexport.runtime import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 8  # sequences in one call
_LONGEST = 2048  # tokens of a sequence, where the model does not say
_NEW_TOKENS = 256  # generated at most, where the task does not say

Progress = Callable[[int, int], None]
"""Called with requests done and requests in all."""
Request = tuple[Any, list[int], list[int]]
"""What was asked, tokens of the context (one or more) and of the continuation."""


class DecoderLM(TemplateLM):
    """Sequences of about the same length go through together, padded on the right: what follows a token changes nothing
    of it. Equal sequences go through once."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        batch: int = BATCH,
        progress: Progress | None = None,
    ):
        super().__init__()
        self.decoder, self.progress = decoder, progress
        self.tokenizer: Any = tokenizer
        self.batch = decoder.fixed_batch or batch
        self.longest = min(decoder.max_positions or _LONGEST, _LONGEST)

    # ------------------------------------------------------------------------------------------------------- tokens

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            first = self.tokenizer.bos_token
            add_special_tokens = not (first and string.startswith(first))
        found: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return found

    # ---------------------------------------------------------------------------------------------- log-likelihoods

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        """Natural logarithm of each continuation's probability, and whether greedy decoding would give it.

        A sequence that is too long loses the beginning of its context.
        """
        asked: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            kept = [*context, *continuation][-self.longest :]
            asked.setdefault((tuple(kept), len(continuation)), []).append(place)
        order = sorted(asked, key=lambda of: (-len(of[0]), of))
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            for of, answer in zip(part, self._scored(part), strict=True):
                found |= dict.fromkeys(asked[of], answer)
            if self.progress:
                self.progress(len(found), len(requests))
        return [found[place] for place in range(len(requests))]

    def _scored(self, part: Sequence[tuple[tuple[int, ...], int]]) -> list[tuple[float, bool]]:
        fed = [tokens[:-1] for tokens, _ in part]
        rows = max(self.decoder.fixed_batch or 0, len(fed))
        ids = np.zeros((rows, max(map(len, fed))), np.int64)
        mask = np.zeros_like(ids)
        mask[:, 0] = 1  # a row without a token is none
        for row, tokens in enumerate(fed):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        logits, _ = self.decoder.forward(ids, attention_mask=None if mask.all() else mask)
        answers = []
        for row, (tokens, count) in enumerate(part):
            end = len(tokens) - 1
            said = logits[row, end - count : end].astype(np.float64)
            wanted = np.asarray(tokens[len(tokens) - count :])
            top = said.max(-1, keepdims=True)
            normal = top[:, 0] + np.log(np.exp(said - top).sum(-1))
            chosen = said[np.arange(count), wanted]
            answers.append((float((chosen - normal).sum()), bool((said.argmax(-1) == wanted).all())))
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that do not overlap."""
        windows: list[Request] = []
        owners = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.longest - 1,
                context_len=1,
            ):  # fmt: skip
                context, continuation = make_disjoint_window(window)
                windows.append((None, list(context), list(continuation)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += likelihood
        return totals

    # --------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy, one after the other. What wants sampling is refused: its answer would be another each time."""
        texts = []
        for done, request in enumerate(requests):
            context, wanted = request.args
            if wanted.get("do_sample") or wanted.get("temperature"):
                raise ValueError("tasks that sample are not supported; greedy decoding is")
            until = wanted.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            most = int(wanted.get("max_gen_toks") or wanted.get("max_new_tokens") or _NEW_TOKENS)
            # A prompt that is too long loses its beginning, but not more than half of the room goes to the answer.
            room = self.decoder.max_positions or max(_LONGEST, 2 * most)
            prompt = self.tok_encode(context)[-max(room - most, room // 2) :]
            texts.append(self._generated(prompt, until, min(most, room - len(prompt))))
            if self.progress:
                self.progress(done + 1, len(requests))
        return texts

    def _generated(self, prompt: list[int], until: Sequence[str], most: int) -> str:
        """Text before the first of `until`, the end token, or `most` tokens."""
        ids = np.array([prompt], np.int64)
        past = self.decoder.room(1, len(prompt) + most)
        tokens: list[int] = []
        text = ""
        for _ in range(most):
            logits, past = self.decoder.last_logits(ids, past)
            tokens.append(int(logits[0].argmax()))
            if tokens[-1] == self.eot_token_id:
                tokens.pop()
                break
            text = self.tokenizer.decode(tokens)
            if any(stop in text for stop in until):
                break
            ids = np.array([[tokens[-1]]], np.int64)
        text = self.tokenizer.decode(tokens)
        return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]
