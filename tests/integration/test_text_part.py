"""Multimodal checkpoints: the text model is taken out where its family is known, others are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_text

import slimexport
from slimexport.checkpoint.load import load_weights
from slimexport.config import RunConfig
from slimexport.errors import BadInputError
from slimexport.loading import load_model
from slimexport.testing import tiny_config, tiny_tokenizer


def multimodal(kind: str) -> Any:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        Qwen3_5Config,
        Qwen3_5ForConditionalGeneration,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
    )

    torch.manual_seed(0)
    seen = {"hidden_size": 32, "intermediate_size": 40, "patch_size": 14}
    eyes = {**seen, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    if kind == "mistral3":
        words = tiny_config("mistral").to_dict()
        eyes |= {"model_type": "pixtral", "head_dim": 16}
        return Mistral3ForConditionalGeneration(
            Mistral3Config(text_config=words, vision_config=eyes, image_token_index=200)
        )
    if kind == "smolvlm":
        words = tiny_config("llama").to_dict()
        return SmolVLMForConditionalGeneration(
            SmolVLMConfig(text_config=words, vision_config=eyes, image_token_id=200, tie_word_embeddings=True)
        )
    if kind == "gemma3":
        words = tiny_config("gemma3_text").to_dict()
        return Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=words, vision_config=eyes, mm_tokens_per_image=4, image_token_index=200,
                         boi_token_index=201, eoi_token_index=202)
        )  # fmt: skip
    words = tiny_config("qwen3_5_text").to_dict()
    eyes = {**seen, "depth": 1, "num_heads": 2, "out_hidden_size": words["hidden_size"], "num_position_embeddings": 4}
    return Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=words, vision_config=eyes, tie_word_embeddings=True)
    )


def saved(model: Any, place: Path) -> Path:
    model.eval().save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


TEXTS = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text", "mistral3": "mistral", "smolvlm": "llama"}


@pytest.mark.parametrize("kind", TEXTS)
def test_the_text_model_is_taken_out(kind: str, tmp_path: Path) -> None:
    whole = multimodal(kind)
    ids = torch.arange(3, 40)[None]
    loaded = load_model(RunConfig(model=str(saved(whole, tmp_path / "whole"))))
    assert loaded.architecture.family.model_type == TEXTS[kind]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, whole(input_ids=ids).logits)
    loaded.model.save_pretrained(tmp_path / "text")
    again = load_weights(tmp_path / "text")
    assert again.config.model_type == TEXTS[kind]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, whole(input_ids=ids).logits)


def test_a_head_of_its_own_counts_whatever_the_config_says(tmp_path: Path) -> None:
    """Mistral 3's config says that embedding and head are one where the checkpoint says nothing."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = multimodal("mistral3").config
    whole = Mistral3ForConditionalGeneration(Mistral3Config(**{**config.to_dict(), "tie_word_embeddings": False}))
    place = saved(whole, tmp_path / "whole")
    raw = json.loads((place / "config.json").read_text())
    for part in (raw, raw["text_config"]):
        part.pop("tie_word_embeddings", None)
    (place / "config.json").write_text(json.dumps(raw))
    loaded = load_model(RunConfig(model=str(place)))
    assert not loaded.architecture.tied
    assert not loaded.model.config.tie_word_embeddings
    stored = sum(parameter.numel() for parameter in loaded.model.parameters())
    assert loaded.architecture.estimates(4).parameters == stored


def test_it_is_pruned_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    place = saved(multimodal("gemma3"), tmp_path / "whole")
    text = tiny_text(tmp_path / "text.txt", 1500, seed=1)
    config = RunConfig(
        model=str(place), ratio=0.2, calibration=str(text), calibration_tokens=512, sequence_length=32, round_to=8,
        fast=True,
    )  # fmt: skip
    slimexport.prune(config, tmp_path / "out")
    again, _ = slimexport.load(tmp_path / "out")
    assert again.config.model_type == "gemma3_text"
    assert not any("vision" in name for name in again.state_dict())
    assert "the text part (gemma3_text) of a gemma3 model" in (tmp_path / "out" / "plan.json").read_text()


def test_one_that_keeps_its_text_model_elsewhere(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    place = saved(multimodal("gemma3"), tmp_path / "whole")
    tensors = load_file(place / "model.safetensors")
    save_file({name.replace("language_model", "words"): t for name, t in tensors.items()}, place / "model.safetensors")
    with pytest.raises(BadInputError, match=r"gemma3_text\) cannot be taken out of this gemma3 model: .* not found"):
        load_model(RunConfig(model=str(place)))


def test_one_whose_text_model_is_not_known(tmp_path: Path) -> None:
    from transformers import Gemma3nConfig

    config = Gemma3nConfig()
    config.architectures = ["Gemma3nForConditionalGeneration"]
    config.save_pretrained(tmp_path / "whole")
    with pytest.raises(BadInputError, match=r"'gemma3n' .*which is no decoder-only language model"):
        load_model(RunConfig(model=str(tmp_path / "whole")))
