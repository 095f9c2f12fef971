"""A tiny random Llama and its ONNX graph, for tests of the runtime and of the verification."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slimexport.artifacts import ExportArtifact, to_dict, write_json

VOCAB = 96
HEAD_DIM = 16


def tiny_llama(seed: int = 0, channels: int = 80, kv_heads: int = 2, scale: float = 6.0) -> LlamaForCausalLM:
    """Three blocks, head_dim 16. `scale` spreads the logits: at 1 a random model is almost uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=channels,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(scale)
    return model


def export_tiny(model: LlamaForCausalLM, directory: Path, *, manifest: bool = True) -> ExportArtifact:
    """Writes model.onnx and config.json (and export.json) into `directory`."""
    from mobius._builder import build_from_module
    from mobius._config_resolver import _config_from_hf
    from mobius._registry import registry

    config = _config_from_hf(model.config)
    module = registry.get("llama")(config)
    package = build_from_module(module, config, execution_provider="cpu")
    package.apply_weights(module.preprocess_weights(dict(model.state_dict())))
    directory.mkdir(parents=True, exist_ok=True)
    package.save(str(directory), progress_bar=False)
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 256}))
    kv = [f"{n}.{part}" for n in range(3) for part in ("key", "value")]
    artifact = ExportArtifact(
        path=str(directory),
        target="onnx",
        builder="mobius",
        precision="fp32",
        provider="cpu",
        files={},
        inputs=("input_ids", "attention_mask", *(f"past_key_values.{name}" for name in kv)),
        outputs=("logits", *(f"present.{name}" for name in kv)),
        kv_heads=(model.config.num_key_value_heads,) * 3,
        head_dim=HEAD_DIM,
        left_padding=False,
    )
    if manifest:
        write_json(directory / "export.json", to_dict(artifact))
    return artifact
