"""How llama.cpp is to cut text into words before it merges bytes: the one of its ways that gives the tokenizer's ids.

llama.cpp knows ways by name and no package says which is a tokenizer's. So it is asked: a file with the vocabulary and
each name in turn, texts that differ in nearly all of the ways, and the first name by which all ids come out the same.
"""

from __future__ import annotations

import tempfile
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimexport.errors import BadInputError
from slimexport.targets.gguf import file
from slimexport.targets.gguf.architecture import Fields
from slimexport.targets.gguf.vocabulary import BYTE_LEVEL, CONTROL, USER_DEFINED, Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from slimexport.runtime.llama_api import LlamaModel

_PRE = "tokenizer.ggml.pre"
NAMES = (
    "llama-bpe", "gpt-2", "smollm", "qwen2", "qwen35", "tekken", "gpt-4o", "llama4", "deepseek-v3", "deepseek-llm",
    "deepseek-coder", "deepseek-r1-qwen", "starcoder", "command-r", "falcon", "stablelm2", "olmo", "dbrx", "glm4",
    "chatglm-bpe", "refact", "codeshell", "exaone", "exaone4", "exaone-moe", "phi-2", "mpt", "bloom", "poro-chat",
    "gpt3-finnish", "viking", "jais", "jais-2", "smaug-bpe", "minerva-7b", "megrez", "trillion", "bailingmoe",
    "superbpe", "seed-coder", "hunyuan", "hunyuan-dense", "kimi-k2", "grok-2", "granite-docling", "minimax-m2",
    "afmoe", "solar-open", "tiny_aya", "joyai-llm", "youtu", "midm-2.0", "a.x-4.0", "chameleon", "lfm2", "mellum2",
)  # fmt: skip
"""The usual ones first. One that the installed llama.cpp does not know is passed over."""

TEXTS = (
    "Hello, world! It's what they'd say; I'm sure you'll, we've, he's DON'T I'LL WE'RE it’s",
    "0 1 12 123 1234 12345 1234567 3.14159 1,000,000 2024-01-31 v2.0 x86 a1b2 ½ ² Ⅳ ٣٤٥ १२३",
    "a  b   c    d\te\t\tf  \n g\n\nh\n\n\n  i\r\nj \n\n \t k   ",
    " leading", "  two", "\n", "\n\n\n", " \n \n", "\t", "   ", "trailing  ", "end\n", "x\n\n",
    "def f(x: int) -> str:\n    return f\"{x!r}\"  # why?\n\n\tif (a && b) { c[i] += 0x1F; } // <html>&amp;</html>\n",
    "https://example.org/a_b?c=d&e=%20#f user@host.com C:\\dir\\file.txt snake_case camelCase HTTPServer iPhone",
    "!!! ??? ... --- === ***bold*** (a) [b] {c} <d> $5.00 €7 50% #tag @name «q» “r” … — – · ~`^|\\/",
    "日本語のテキスト。中文字符，测试！ 한국어 문장입니다. ภาษาไทย हिन्दी पाठ العربية עברית",
    "café naïve Ünïcödé ÀÉÎ Straße ǅ ŒUVRE ÑANDÚ Привет, МИР! Ελληνικά ß ﬁ",
    "cafe\u0301 n\u0303 o\u0302\u0323 क\u094d\u0937",
    "😀 👍🏽 👨‍👩‍👧‍👦 🇩🇪 ❤️ ✓ → ∑ √2 ∞ ℝ 𝔘𝔫𝔦 \u200b\u00a0x\u3000y\ufeff \u2028z",
    "I'Ve'sT 'S 'twas rock'n'roll O'Neil's '90s \"'quoted'\" 'd've",
    "word1word 2words 3-4 5+6=11 A1 B22 C333 #1 no.5 (12) 7% 1st 22nd\n100\n 200\n  3000",
)  # fmt: skip


def _ways(vocabulary: Vocabulary) -> dict[str, Fields]:
    """Name -> what the file says of it. Pieces are not cut into words; a text may begin with a mark for a space."""
    if vocabulary.model == BYTE_LEVEL:
        return {name: {_PRE: name} for name in NAMES}
    spaced = {"default, space before": True, "default": False}
    return {name: {_PRE: "default", "tokenizer.ggml.add_space_prefix": before} for name, before in spaced.items()}


def pre_tokenizer_of(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> tuple[str, Fields]:
    """The name of the way, and what the file says of it. Raises BadInputError where none gives the tokenizer's ids, or
    xllamacpp is missing."""
    from slimexport.runtime import llama_api

    llama_api.require()
    texts = _texts(vocabulary)
    wanted = [_ids(tokenizer, text) for text in texts]
    nearest = ""
    fewest = len(texts) + 1
    with tempfile.TemporaryDirectory() as place:
        for name, fields in _ways(vocabulary).items():
            model = _opened(Path(place) / "vocabulary.gguf", vocabulary, fields)
            if model is None:
                continue
            wrong = [text for text, ids in zip(texts, wanted, strict=True) if _theirs(model, text) != ids]
            if not wrong:
                return name, fields
            if len(wrong) < fewest:
                fewest, nearest = len(wrong), f"nearest is {name}, which differs for {wrong[0]!r}"
    raise BadInputError(f"llama.cpp cuts text in none of its ways like this tokenizer ({nearest}): no GGUF of it.")


def _texts(vocabulary: Vocabulary) -> list[str]:
    """`TEXTS`, and some around the tokens that stand beside the vocabulary."""
    own = [
        text for text, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind in (CONTROL, USER_DEFINED)
    ]
    asked = [*dict.fromkeys([*own[:8], *own[-8:]])]
    around = [f"{text}user\nHi{text}\n{text} x {text}{text}1" for text in asked]
    return [unicodedata.normalize("NFC", t) if vocabulary.normalise else t for t in (*TEXTS, *around)]


Both = tuple[list[int], list[int]]
"""Ids of a text alone, and with what is put around every text."""


def _ids(tokenizer: Any, text: str) -> Both:
    alone, whole = (list(tokenizer(text, add_special_tokens=special).input_ids) for special in (False, True))
    return alone, whole


def _theirs(model: LlamaModel, text: str) -> Both:
    return model.tokenize(text, special=False), model.tokenize(text, special=True)


def _opened(path: Path, vocabulary: Vocabulary, way: Fields) -> LlamaModel | None:
    """A model of one tiny block with this vocabulary; None where llama.cpp does not know the way."""
    from slimexport.runtime.llama_api import LlamaModel

    file.write(path, "llama", {**_SIZES, **vocabulary.fields(), **way}, _weights(len(vocabulary.tokens)), "fp32")
    try:
        return LlamaModel(path)
    except BadInputError:
        return None


_SIZES: Fields = {
    "llama.context_length": 32, "llama.embedding_length": 2, "llama.block_count": 1, "llama.feed_forward_length": 2,
    "llama.attention.head_count": 1, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": 2,
}  # fmt: skip


def _weights(tokens: int) -> file.Tensors:
    square, row = np.zeros((2, 2), np.float32), np.zeros(2, np.float32)
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    return {
        "token_embd.weight": np.zeros((tokens, 2), np.float32),
        "output_norm.weight": row,
        **{f"blk.0.{name}.weight": row for name in ("attn_norm", "ffn_norm")},
        **{f"blk.0.{name}.weight": square for name in matrices},
    }
