"""The same model off the 4-bit grid, and weight-only quantisation of an export: what quantising costs, measured fairly.

The blocks of the demo model were dequantised from 4 bits, so int4 in blocks of 32 gives them back exactly (relative
error 0.000), while a pruned and re-fitted model is off that grid: quantising looks free for the dense model only.
`off_grid` makes an equivalent dense model whose weights lie on no grid (0.078, as for Gaussian numbers). The embedding
was stored in 8 bits, so the tied lm_head never was on the 4-bit grid (0.090, and 0.078 once rotated).
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimexport.artifacts import ExportArtifact, sha256_tree, staged_directory, to_dict, write_json
from slimexport.errors import BadInputError
from slimexport.targets.base import MANIFEST, load_artifact

BLOCK = 32
GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"
READ_ATTENTION, READ_FFN = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@torch.no_grad()
def off_grid(model: Any, seed: int = 0) -> Any:
    """A copy of `model` that computes the same logits from other weights; its lm_head is untied.

    The residual stream h [t, hidden size] is turned to h Q by a random orthogonal Q (the computational invariance of
    SliceGPT, arXiv 2401.15024): RMSNorm does not see a rotation once its weight g is folded into what reads it, so

        embedding E -> E Q;  q, k, v, gate, up, lm_head W -> W diag(g) Q;  o, down W -> Q^T W (bias b -> b Q);  g -> 1

    The final norm goes into the lm_head and not into the embedding: a tied model comes back untied, that much larger,
    and `config.tie_word_embeddings` says so. Computed in float64, returned in the model's precision; blocks of
    different sizes are fine. A rotation also spreads outliers over all dimensions (that is what QuaRot uses it for), so
    the rotated model is rather kinder to few bits than a trained float model would be: what it loses is a better figure
    for the dense model than the grid's, and still a low one.

    Raises BadInputError for a family whose residual is read or written by other modules than these.
    """
    if model.config.model_type not in FAMILIES:
        raise BadInputError(f"off_grid knows {', '.join(FAMILIES)}, not {model.config.model_type}.")
    turned = copy.deepcopy(model)
    embedding, head, body = turned.get_input_embeddings(), turned.get_output_embeddings(), turned.model
    rotation = random_rotation(embedding.weight.shape[1], seed).to(embedding.weight.device)
    readout = head.weight.double()  # taken before the embedding turns: they may be one tensor
    for block in body.layers:
        _read(block.input_layernorm, [getattr(block.self_attn, name) for name in READ_ATTENTION], rotation)
        _write(block.self_attn.o_proj, rotation)
        _read(block.post_attention_layernorm, [getattr(block.mlp, name) for name in READ_FFN], rotation)
        _write(block.mlp.down_proj, rotation)
    head.weight = _parameter(readout * body.norm.weight.double() @ rotation, head.weight)
    body.norm.weight.fill_(1)
    embedding.weight = _parameter(embedding.weight.double() @ rotation, embedding.weight)
    turned.config.tie_word_embeddings = False
    turned.all_tied_weights_keys = {}  # else saving would leave the lm_head out
    return turned


def random_rotation(size: int, seed: int) -> torch.Tensor:
    """float64 [size, size], orthogonal, uniformly distributed; the same for the same seed."""
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    return q * r.diagonal().sign()  # without the signs, QR's own convention would show in Q


def _read(norm: Any, readers: list[Any], rotation: torch.Tensor) -> None:
    """W [out, hidden] -> W diag(g) Q."""
    for linear in readers:
        linear.weight = _parameter(linear.weight.double() * norm.weight.double() @ rotation, linear.weight)
    norm.weight.fill_(1)


def _write(linear: Any, rotation: torch.Tensor) -> None:
    """W [hidden, in] -> Q^T W, b [hidden] -> b Q."""
    linear.weight = _parameter(rotation.T @ linear.weight.double(), linear.weight)
    if linear.bias is not None:
        linear.bias = _parameter(linear.bias.double() @ rotation, linear.bias)


def _parameter(value: torch.Tensor, like: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(value.to(like.dtype), requires_grad=like.requires_grad)


# ------------------------------------------------------------------------------------------------------ quantising


def quantised(onnx_dir: Path, bits: int, out_dir: Path) -> ExportArtifact:
    """Writes `out_dir`: the export in `onnx_dir` with every MatMul of a weight as MatMulNBits, int4 or int8.

    Round to nearest, asymmetric, blocks of 32 along the input, `accuracy_level` 4 (int8 activations: without it 8 bits
    decode 16 times slower), no calibration. The lm_head goes too, tied or not; the embedding's rows, the norms and the
    cache stay float32. `out_dir` is replaced; `slimexport.runtime.OnnxDecoder` opens it like any export.

    Raises BadInputError for other bits than 4 and 8, and for a graph in which a weight was left over.
    """
    if bits not in (4, 8):
        raise BadInputError(f"MatMulNBits is made here with 4 or 8 bits, not {bits}.")
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer

    logging.getLogger(matmul_nbits_quantizer.__name__).setLevel(logging.WARNING)  # it tells of every node
    artifact = load_artifact(onnx_dir)
    model = onnx.load(str(Path(onnx_dir) / GRAPH))
    materialise_transposes(model.graph)
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        model, bits=bits, block_size=BLOCK, is_symmetric=False, accuracy_level=4
    )
    quantizer.process()
    model = quantizer.model.model
    _check_all_taken(model.graph)
    with staged_directory(Path(out_dir)) as staged:
        for path in Path(onnx_dir).iterdir():
            if path.is_file() and path.name not in (GRAPH, WEIGHTS, MANIFEST):
                shutil.copy2(path, staged / path.name)
        onnx.save(model, str(staged / GRAPH), save_as_external_data=True, location=WEIGHTS, size_threshold=1024)
        note = f"MatMulNBits, {bits} bits, blocks of {BLOCK}, asymmetric, accuracy_level 4, lm_head included."
        done = dataclasses.replace(artifact, path=".", files=sha256_tree(staged), notes=(*artifact.notes, note))
        write_json(staged / MANIFEST, to_dict(done))
    return load_artifact(Path(out_dir))


def materialise_transposes(graph: Any) -> None:
    """Turns `MatMul(x, Transpose(weight))` into `MatMul(x, weight')`: the quantiser passes over what is no initializer.

    That is how a tied lm_head reads the embedding. `graph` is an onnx.GraphProto and is changed in place; the weight'
    is a copy, so a tied model grows by it before it shrinks.
    """
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    transposes = {n.output[0]: n for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights}
    for node in graph.node:
        if node.op_type == "MatMul" and (transpose := transposes.get(node.input[1])):
            array = numpy_helper.to_array(weights[transpose.input[0]])
            order = next((list(a.ints) for a in transpose.attribute if a.name == "perm"), None)
            name = f"{transpose.output[0]}.materialised"
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array.transpose(order)), name))
            node.input[1] = name
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for output, transpose in transposes.items():
        if output not in read:
            graph.node.remove(transpose)


def _check_all_taken(graph: Any) -> None:
    weights = {tensor.name for tensor in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        second = node.input[1] if node.op_type in ("MatMul", "Gemm") else ""
        if second in weights or (second in made and made[second].op_type == "Transpose"):
            raise BadInputError(f"{node.name} ({node.op_type}) was not quantised: its weight {second} is still float.")
