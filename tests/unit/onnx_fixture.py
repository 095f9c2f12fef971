"""A tiny random Llama and its ONNX graph, for tests of the runtime and of the verification."""

from __future__ import annotations

from pathlib import Path

import onnx_ir
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slimexport.artifacts import ExportArtifact, to_dict, write_json
from slimexport.targets.base import ExportOptions
from slimexport.targets.builders.mobius import MobiusBuilder
from slimexport.targets.files import write_config

VOCAB = 96
HEAD_DIM = 16
POSITIONS = 256


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
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(scale)
    return model


def export_tiny(model: LlamaForCausalLM, directory: Path) -> ExportArtifact:
    """Writes model.onnx, config.json and export.json into `directory`: an export without a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    graph = MobiusBuilder().build(model, ExportOptions())
    onnx_ir.save(graph.model, str(directory / "model.onnx"), external_data="model.onnx.data")
    write_config(model, directory)
    artifact = ExportArtifact(
        path=str(directory),
        target="onnx",
        builder="mobius",
        precision="fp32",
        provider="cpu",
        files={},
        inputs=graph.inputs,
        outputs=graph.outputs,
        kv_heads=graph.kv_heads,
        head_dim=graph.head_dim,
        left_padding=graph.left_padding,
        shared_kv=graph.shared_kv,
    )
    write_json(directory / "export.json", to_dict(artifact))
    return artifact
