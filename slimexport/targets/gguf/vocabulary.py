"""The tokenizer, as the file holds it: tokens, their kinds, merges, special ids, chat template."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slimexport.errors import BadInputError
from slimexport.targets.gguf.architecture import Fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's kinds of tokens: of the vocabulary; what is in it otherwise; special; put beside the vocabulary; without
a text; a single byte."""

BYTE_LEVEL, PIECES = "gpt2", "llama"
"""llama.cpp's kinds of tokenizers: BPE of bytes, and SentencePiece's BPE of characters, which falls back to bytes."""

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_NFC = "The tokenizer brings text into the Unicode form NFC, and llama.cpp does not: give it text in that form."


@dataclass(frozen=True)
class Vocabulary:
    """`normalise` names the Unicode form that the tokenizer brings text into first."""

    model: str  # BYTE_LEVEL or PIECES
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[tuple[str, str], ...]
    special: dict[str, int] = field(default_factory=dict)  # bos, eos, unknown, padding -> id
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None
    normalise: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        return (_NFC,) if self.normalise else ()

    def fields(self) -> Fields:
        """The file's metadata, but for how text is cut into words (`pre_tokenizer.py`)."""
        by_kind: Fields
        if self.model == BYTE_LEVEL:
            by_kind = {"tokenizer.ggml.merges": [" ".join(merge) for merge in self.merges]}
        else:
            by_kind = {"tokenizer.ggml.scores": self._scores()}
        made: Fields = {
            "tokenizer.ggml.model": self.model,
            "tokenizer.ggml.tokens": list(self.tokens),
            "tokenizer.ggml.token_type": list(self.kinds),
            **by_kind,
            **{f"tokenizer.ggml.{name}_token_id": id for name, id in self.special.items()},
            "tokenizer.ggml.add_bos_token": self.add_bos,
            "tokenizer.ggml.add_eos_token": self.add_eos,
        }
        if self.chat_template:
            made["tokenizer.chat_template"] = self.chat_template
        return made

    def _scores(self) -> list[float]:
        """SentencePiece merges what makes the token of the highest score: the one that the first merge makes."""
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(self.merges):
            ranks.setdefault("".join(merge), rank)
        return [-float(ranks.get(token, len(self.merges))) for token in self.tokens]


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """With `size` tokens, as many as the model's embedding has rows.

    Raises BadInputError for a tokenizer that is no BPE of bytes or of SentencePiece's kind, has more tokens than that,
    no token that ends a text, or puts others than that and the first around it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BadInputError(f"The tokenizer {type(tokenizer).__name__} has no tokenizer.json to be written as GGUF.")
    said = json.loads(backend.to_str())
    model = _kind(said)
    tokens: list[str | None] = [None] * size
    kinds = [UNUSED] * size
    added = {token["id"]: token for token in said["added_tokens"]}
    for text, id in {**said["model"]["vocab"], **{t["content"]: i for i, t in added.items()}}.items():
        if id >= size:
            raise BadInputError(f"The tokenizer's token {text!r} has the id {id}: the model has {size} tokens.")
        tokens[id] = text
        kinds[id] = (CONTROL if added[id]["special"] else USER_DEFINED) if id in added else NORMAL
        if model == PIECES and _BYTE.fullmatch(text):
            kinds[id] = BYTE
    special = _special(tokenizer)
    if model == PIECES and "unknown" in special:
        kinds[special["unknown"]] = UNKNOWN
    before, after = _around(tokenizer, special)
    template = tokenizer.chat_template
    return Vocabulary(
        model,
        tuple(f"[PAD{id}]" if text is None else text for id, text in enumerate(tokens)),
        tuple(kinds),
        tuple(tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in said["model"]["merges"]),
        special,
        before,
        after,
        template if isinstance(template, str) else (template or {}).get("default"),
        "NFC" if model == BYTE_LEVEL and said.get("normalizer") else None,
    )


def _kind(said: dict[str, Any]) -> str:
    """Raises BadInputError where none of llama.cpp's tokenizers that are known here can be this one."""
    model = said["model"]
    cut = json.dumps(said.get("pre_tokenizer"))
    if model["type"] != "BPE" or not (model.get("byte_fallback") or "ByteLevel" in cut):
        name = "BPE of characters" if model["type"] == "BPE" else model["type"]
        raise BadInputError(f"The tokenizer is {name}: BPE of bytes, or with bytes for the rest, is written as GGUF.")
    if not model["merges"]:
        raise BadInputError("The tokenizer has no merges: llama.cpp's BPE needs some.")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise BadInputError(f"The tokenizer's BPE has a {name}, which llama.cpp's has not.")
    if model.get("byte_fallback"):
        return PIECES  # which normalisers put a mark for a space is seen in the ids
    normalizer = (said.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise BadInputError(f"The tokenizer normalises text ({normalizer}), which llama.cpp's BPE does not.")
    return BYTE_LEVEL


def _special(tokenizer: Any) -> dict[str, int]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise BadInputError("The tokenizer names no token that ends a text, and llama.cpp would take one of its own.")
    bos = tokenizer.bos_token_id
    found = {
        "bos": eos if bos is None else bos, "eos": eos,
        "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id,
    }  # fmt: skip
    return {name: int(id) for name, id in found.items() if id is not None}


def _around(tokenizer: Any, special: dict[str, int]) -> tuple[bool, bool]:
    """Whether the tokenizer puts the first token before every text, and the one that ends it behind."""
    plain = list(tokenizer("x", add_special_tokens=False).input_ids)
    whole = list(tokenizer("x").input_ids)
    for before in (False, True):
        for after in (False, True):
            if whole == [special["bos"]] * before + plain + [special["eos"]] * after:
                return before, after
    raise BadInputError(f"The tokenizer makes {whole} of {plain}: llama.cpp adds a first and a last token at most.")
