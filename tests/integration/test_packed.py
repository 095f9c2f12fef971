"""Checkpoints in MXFP4 (GPT-OSS) and FP8 (DeepSeek V3): unpacked on loading, pruned and saved as plain floats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_text
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slimexport
from slimexport.config import RunConfig
from slimexport.errors import BadInputError
from slimexport.loading import load_model
from slimexport.testing import tiny_config, tiny_model, tiny_tokenizer

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # of the OCP Microscaling formats; with the sign as the highest bit
BLOCK = 32


def pack(experts: int, out: int, into: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random (blocks, scales) as GPT-OSS has them, and the matrices [experts, into, out] that they stand for."""
    of = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (experts, out, into // BLOCK, BLOCK), generator=of)
    scales = torch.randint(122, 126, (experts, out, into // BLOCK), generator=of)
    plain = torch.tensor([*E2M1, *(-value for value in E2M1)])[codes] * 2.0 ** (scales - 127)[..., None]
    blocks = codes[..., 0::2] + 16 * codes[..., 1::2]
    return blocks.to(torch.uint8), scales.to(torch.uint8), plain.flatten(2).mT.contiguous()


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, Any]:
    """A directory with a packed model, and the same model unpacked by hand."""
    config = tiny_config("gpt_oss", hidden_size=128, intermediate_size=64)
    model = tiny_model(config).to(torch.bfloat16)
    directory = tmp_path / "packed"
    model.save_pretrained(str(directory))
    tiny_tokenizer().save_pretrained(str(directory))
    tensors = load_file(str(directory / "model.safetensors"))
    for block in range(config.num_hidden_layers):
        for number, (name, out, into) in enumerate((("gate_up_proj", 128, 128), ("down_proj", 128, 64))):
            full = f"model.layers.{block}.mlp.experts.{name}"
            blocks, scales, plain = pack(config.num_local_experts, out, into, seed=2 * block + number)
            del tensors[full]
            tensors |= {f"{full}_blocks": blocks, f"{full}_scales": scales}
            model.get_parameter(full).data.copy_(plain)
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    raw = json.loads((directory / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (directory / "config.json").write_text(json.dumps(raw))
    return directory, model


def test_loaded_as_by_hand(packed: tuple[Path, Any]) -> None:
    directory, by_hand = packed
    loaded = load_model(RunConfig(model=str(directory)))
    assert loaded.note == "unpacked from mxfp4"
    assert loaded.source.stored_dtype == "bfloat16"
    for name, parameter in by_hand.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter), name


def test_pruned_and_saved_without_a_trace_of_the_packing(packed: tuple[Path, Any], tmp_path: Path) -> None:
    directory, _ = packed
    out, text = tmp_path / "out", tiny_text(tmp_path / "text.txt", 1500, seed=1)
    config = RunConfig(
        model=str(directory), ratio=0.3, layout="uniform", allocation="uniform", round_to=8, device="cpu",
        calibration=str(text), calibration_tokens=256, sequence_length=32, curvature_tokens=32,
    )  # fmt: skip
    slimexport.prune(config, out)
    assert "quantization_config" not in json.loads((out / "checkpoint" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(str(out / "checkpoint"))
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.experts.down_proj.shape[1] < 64


def test_fp8_is_unpacked_by_its_scales(tmp_path: Path) -> None:
    config = tiny_config("deepseek_v3", hidden_size=128)
    model = tiny_model(config).to(torch.bfloat16)
    for place in ("plain", "packed"):
        model.save_pretrained(str(tmp_path / place))
        tiny_tokenizer().save_pretrained(str(tmp_path / place))
    tensors = load_file(str(tmp_path / "plain" / "model.safetensors"))
    packed = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        scale = torch.rand(2, 2, generator=torch.Generator().manual_seed(len(name))) + 0.5
        spread = scale.repeat_interleave(rows // 2, 0).repeat_interleave(columns // 2, 1)
        code = (tensors[name].float() / spread).to(torch.float8_e4m3fn)
        packed |= {name: code, f"{name}_scale_inv": scale}
        tensors[name] = (code.float() * spread).to(torch.bfloat16)
    assert any(".experts.0." in name for name in packed), list(packed)
    save_file(tensors, str(tmp_path / "plain" / "model.safetensors"), metadata={"format": "pt"})
    save_file(packed, str(tmp_path / "packed" / "model.safetensors"), metadata={"format": "pt"})
    path = tmp_path / "packed" / "config.json"
    kept = ["lm_head", "model.layers.1.mlp.gate"]
    how = {"quant_method": "fp8", "weight_block_size": [64, 64], "modules_to_not_convert": kept}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": how}))
    expected = load_model(RunConfig(model=str(tmp_path / "plain"))).model.state_dict()
    loaded = load_model(RunConfig(model=str(tmp_path / "packed")))
    assert (loaded.note, loaded.source.stored_dtype) == ("unpacked from fp8", "bfloat16")
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_blocks_for_later_tokens_are_left_out(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("deepseek_v3", num_nextn_predict_layers=1))
    model.save_pretrained(str(tmp_path))
    tiny_tokenizer().save_pretrained(str(tmp_path))
    path = str(tmp_path / "model.safetensors")
    tensors = load_file(path) | {"model.layers.3.eh_proj.weight": torch.zeros(2, 2)}
    save_file(tensors, path, metadata={"format": "pt"})
    assert load_model(RunConfig(model=str(tmp_path))).note == "without the 1 tensors that predict tokens further ahead"
    save_file(tensors | {"model.layers.4.eh_proj.weight": torch.zeros(2, 2)}, path, metadata={"format": "pt"})
    with pytest.raises(BadInputError, match=r"no place in the model .* model.layers.4.eh_proj.weight"):
        load_model(RunConfig(model=str(tmp_path)))
