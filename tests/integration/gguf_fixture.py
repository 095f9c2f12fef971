"""Tiny random models with sizes that llama.cpp's blocks of 32 fit, and a byte-level BPE tokenizer with merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from slimexport.architectures import architecture_of
from slimexport.architectures.family import Kept
from slimexport.artifacts import BlockSizes, ExportArtifact
from slimexport.pruning.shrink import apply_sizes, shrink_block
from slimexport.runtime import open_decoder
from slimexport.targets import registry
from slimexport.targets.base import ExportOptions
from slimexport.verification.numerics import check_export

VOCAB = 320
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
DIFFERENT = (BlockSizes(2, 1, 64), BlockSizes(4, 2, 96), BlockSizes(1, 2, 32))
TEXT = [
    "it's 12345 small models; the model's weights were pruned, and they'll be shipped in 2024.",
    "def prune(model, ratio=0.25):\n    return [block for block in model if block.score > ratio]\n\n",
    "Grüße aus Köln! 日本語 🙂   spaces\t\ttabs 3.14159",
] * 3


def tiny(family: str = "llama", **changes: Any) -> Any:
    """Three blocks of 8 query heads in 4 KV groups, 16 wide, and 96 channels; norms and biases are random."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 256,
        "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    if family == "llama":
        values |= {"attention_bias": True, "mlp_bias": True}
    if family == "mistral":
        values |= {"sliding_window": None}
    config = getattr(transformers, f"{FAMILIES[family]}Config")(**(values | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{FAMILIES[family]}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def per_layer(family: str = "llama", blocks: tuple[BlockSizes, ...] = DIFFERENT, **changes: Any) -> Any:
    """The same, cut to `blocks` by keeping the last KV groups, the first heads of each and the last channels."""
    model = tiny(family, **changes)
    architecture = architecture_of(model.config, "tiny")
    for block, sizes, dense in zip(model.model.layers, blocks, architecture.blocks, strict=True):
        groups = tuple(range(dense.kv_groups))[-sizes.kv_groups :]
        heads = tuple(g * dense.heads_per_group + h for g in groups for h in range(sizes.heads_per_group))
        channels = tuple(range(dense.channels))[-sizes.channels :]
        shrink_block(block, architecture, Kept(groups, heads, channels, dense))
    apply_sizes(model.config, architecture, blocks)
    return model


def bpe(digits: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Trained on a few lines; with `digits` each digit is a word of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), cut]) if digits else cut
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 4, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    return made


def pieces(legacy: bool = True) -> transformers.PreTrainedTokenizerFast:
    """As transformers converts SentencePiece's models: all merges that make a token, and bytes for what is in none."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = sorted({word for line in TEXT[:2] for word in line.replace("\n", " ").split(" ") if word})
    parts = {f"▁{word}"[:end] for word in words for end in range(2, len(word) + 2)} | {"er", "in", "ed", "ode", "mod"}
    alphabet = sorted({character for part in parts for character in part} | set("▁ 0123456789"[:1]))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(parts, key=lambda part: (len(part), part)) + [c for c in alphabet if c not in parts]
    vocabulary = {token: id for id, token in enumerate(dict.fromkeys(tokens))}
    merges = [
        (token[:cut], token[cut:])
        for token in vocabulary
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary and not token.startswith("<")
    ]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    backend = made.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def export(directory: Path, model: Any, tokenizer: Any = None, precision: str = "fp32") -> ExportArtifact:
    """Through the target, checked as a run checks it."""

    def check(artifact: ExportArtifact, reference: ExportArtifact | None = None) -> None:
        other = open_decoder(Path(reference.path), threads=1) if reference else model
        check_export(open_decoder(Path(artifact.path), threads=1), other, steps=8)

    directory.mkdir(parents=True)
    return registry.get("gguf").export(model, tokenizer or bpe(), directory, ExportOptions(precision=precision), check)


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids), use_cache=False).logits.numpy()
