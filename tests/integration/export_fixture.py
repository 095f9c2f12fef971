"""Tiny random decoders of both layouts, a tokenizer, and a plain ONNX Runtime loop to compare them with torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from torch import nn

from slimexport.artifacts import ExportArtifact

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Every size differs from every other, so that a swapped dimension cannot pass: hidden 60, query 160, KV 80, FFN 44.
VOCAB, HEAD_DIM, HEADS, GROUPS = 263, 16, 10, 5
# Per block: the KV groups that stay, query heads per group, channels. Block 1 stays dense.
SHRUNK: dict[int, tuple[list[int], int, int]] = {0: ([1, 3, 4], 1, 28), 2: ([0, 2], 2, 36), 3: ([0, 1, 2, 4], 1, 20)}
KV_HEADS = {"uniform": (5, 5, 5, 5), "per_layer": (3, 5, 2, 4)}


def tiny(family: str = "llama", layout: str = "uniform", **settings: Any) -> transformers.PreTrainedModel:
    """Four blocks. Norm weights and biases are random too, as a trained model's are."""
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 60,
        "intermediate_size": 44,
        "num_hidden_layers": 4,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "tie_word_embeddings": False,
    }
    config = getattr(transformers, f"{name}Config")(**values | settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if layout == "per_layer":
        for index, (groups, per_group, channels) in SHRUNK.items():
            shrink(model.model.layers[index], groups, per_group, channels)
    return model


def shrink(block: nn.Module, groups: list[int], per_group: int, channels: int) -> None:
    """Keeps these KV groups, the first `per_group` query heads of each, and the last `channels` channels."""
    attention = block.self_attn
    size, dense = attention.head_dim, attention.num_key_value_groups
    heads = [group * dense + head for group in groups for head in range(per_group)]
    query = [head * size + i for head in heads for i in range(size)]
    key = [group * size + i for group in groups for i in range(size)]
    for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        _keep(getattr(attention, name), rows=rows)
    _keep(attention.o_proj, columns=query)
    attention.num_key_value_groups = per_group
    dense = block.mlp.down_proj.in_features
    kept = list(range(dense - channels, dense))
    _keep(block.mlp.gate_proj, rows=kept)
    _keep(block.mlp.up_proj, rows=kept)
    _keep(block.mlp.down_proj, columns=kept)


def _keep(linear: nn.Linear, *, rows: list[int] | None = None, columns: list[int] | None = None) -> None:
    weight = linear.weight.data
    linear.weight = nn.Parameter(weight[rows] if rows is not None else weight[:, columns])
    if rows is not None and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.data[rows])


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes and two special tokens, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    return made


class Loop:
    """The graph in a plain InferenceSession. Calls take and give numpy, with the past as a dict of inputs."""

    def __init__(self, artifact: ExportArtifact):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        self.artifact = artifact
        self.session = onnxruntime.InferenceSession(str(Path(artifact.path) / "model.onnx"), options)

    def empty(self, batch: int) -> dict[str, np.ndarray]:
        names = [name for name in self.artifact.inputs if name.startswith("past_key_values")]
        shapes = {n: (batch, self.artifact.kv_heads[int(n.split(".")[1])], 0, self.artifact.head_dim) for n in names}
        dtype = {"fp32": np.float32, "fp16": np.float16}[self.artifact.precision]
        return {name: np.zeros(shape, dtype) for name, shape in shapes.items()}

    def __call__(
        self,
        ids: np.ndarray,
        past: dict[str, np.ndarray] | None = None,
        mask: np.ndarray | None = None,
        positions: np.ndarray | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        batch, tokens = ids.shape
        past = self.empty(batch) if past is None else past
        start = next(iter(past.values())).shape[2]
        feed = {"input_ids": ids, "attention_mask": np.ones((batch, start + tokens), np.int64), **past}
        if mask is not None:
            feed["attention_mask"] = mask
        if "position_ids" in self.artifact.inputs:
            count = np.tile(np.arange(start, start + tokens), (batch, 1))
            feed["position_ids"] = count if positions is None else positions
        if self.session.get_overridable_initializers():
            feed["all_logits"] = np.array(True)
        logits, *present = self.session.run(list(self.artifact.outputs), feed)
        names = [name.replace("present", "past_key_values") for name in self.artifact.outputs[1:]]
        return logits, dict(zip(names, present, strict=True))


def torch_logits(model: transformers.PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids), use_cache=False).logits.numpy()


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def assert_same_logits(model: transformers.PreTrainedModel, artifact: ExportArtifact, tolerance: float = 1e-4) -> None:
    """Prefill of two rows; then one row in a prefill, a chunk on the past, and decode steps."""
    loop = Loop(artifact)
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, 40))
    expected = torch_logits(model, ids)
    assert relative(loop(ids)[0], expected) < tolerance
    pieces, past = [], None
    for start, end in ((0, 17), (17, 34), *((step, step + 1) for step in range(34, 40))):
        logits, past = loop(ids[:1, start:end], past)
        pieces.append(logits)
    assert relative(np.concatenate(pieces, 1), expected[:1]) < tolerance


def assert_left_padding(model: transformers.PreTrainedModel, artifact: ExportArtifact) -> None:
    """A short row beside a long one, padded on the left, prefill and one decode step: as if it were alone."""
    loop = Loop(artifact)
    ids = np.random.default_rng(1).integers(0, VOCAB, (2, 21))
    alone = torch_logits(model, ids[:1, 6:])
    mask = np.ones_like(ids)
    mask[0, :6] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    logits, past = loop(ids[:, :20], None, mask[:, :20], positions[:, :20])
    assert relative(logits[:1, 6:], alone[:, :-1]) < 1e-4
    logits, _ = loop(ids[:, 20:], past, mask, positions[:, 20:])
    assert relative(logits[:1], alone[:, -1:]) < 1e-4


def greedy(loop: Loop, prompt: np.ndarray, steps: int = 64) -> list[int]:
    """The ids of prompt [1, t] and of `steps` greedy tokens, decoded one by one on the cache."""
    ids = prompt[0].tolist()
    logits, past = loop(prompt)
    for _ in range(steps):
        ids.append(int(logits[0, -1].argmax()))
        logits, past = loop(np.array([ids[-1:]]), past)
    return ids


def genai_greedy(artifact: ExportArtifact, prompt: np.ndarray, steps: int = 64) -> list[int]:
    import onnxruntime_genai as og

    model = og.Model(artifact.path)
    parameters = og.GeneratorParams(model)
    length = prompt.shape[1] + steps
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt[0].astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0).tolist()


def assert_greedy(
    model: transformers.PreTrainedModel, artifact: ExportArtifact, prompt: np.ndarray | None = None
) -> None:
    """64 tokens are torch's own choices, in plain ONNX Runtime and in onnxruntime-genai."""
    prompt = np.random.default_rng(2).integers(0, VOCAB, (1, 9)) if prompt is None else prompt
    ids = greedy(Loop(artifact), prompt)
    # One uncached forward shows what torch would have chosen at every step.
    chosen = torch_logits(model, np.array([ids]))[0, prompt.shape[1] - 1 : -1].argmax(-1)
    assert chosen.tolist() == ids[prompt.shape[1] :]
    assert genai_greedy(artifact, prompt) == ids
