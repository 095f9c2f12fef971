"""A random llama of some 100,000 parameters with a tokenizer of its own, and texts to go with it: no download."""

from __future__ import annotations

import random
from pathlib import Path

# Everything about the run that makes it short; no setting here is about the result's quality.
QUICK = (
    "--calibration-tokens=2048", "--sequence-length=64", "--eval-tokens=512", "--eval-window=64",
    "--prompt-lengths=16", "--decode-tokens=4", "--latency-runs=0", "--round-to=8",
)  # fmt: skip


def write_texts(directory: Path) -> tuple[Path, Path]:
    """(calibration.txt, evaluation.txt): made-up sentences that share words and no long passage."""
    words = [a + b for a in ("ka", "lo", "mi", "ne", "ru", "sta", "ve") for b in ("da", "gen", "lit", "mor", "x")]
    paths = []
    for seed, name in enumerate(("calibration.txt", "evaluation.txt")):
        draw = random.Random(seed)
        sentences = (" ".join(draw.choices(words, k=draw.randint(5, 14))) + "." for _ in range(1500))
        path = directory / name
        path.write_text("\n".join(sentences), encoding="utf-8")
        paths.append(path)
    return paths[0], paths[1]


def material(directory: Path) -> dict[str, str]:
    """Paths of a model and of its two texts, all written to `directory`."""
    calibration, evaluation = write_texts(directory)
    model = write_model(directory, calibration)
    return {"model": str(model), "calibration": str(calibration), "evaluation": str(evaluation)}


def write_model(directory: Path, text: Path) -> Path:
    """A Hugging Face directory in `directory`/tiny; the tokenizer is a BPE trained on `text`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train([str(text)], trainer)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    place = directory / "tiny"
    LlamaForCausalLM(config).save_pretrained(place)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(place)
    return place
