"""Weights in few bits, as arrays: what the codes of a block stand for, and the nearest of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 32  # inputs of an output that share a scale
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Levels:
    """A weight [N, K] as the operators read it: codes uint8 [N, K / BLOCK, BLOCK * bits / 8], scales [N, K / BLOCK],
    zero points uint8, packed like the codes. A level is (code - zero point) * scale."""

    codes: NDArray[np.uint8]
    scales: Floats
    zero_points: NDArray[np.uint8]

    @property
    def bits(self) -> int:
        return self.codes.shape[-1] * 8 // BLOCK

    def numbers(self) -> NDArray[np.float64]:
        """[N, K], K in whole blocks: what the codes stand for."""
        outputs, blocks = self.scales.shape
        codes = unpacked(self.codes.reshape(outputs, -1), self.bits).reshape(outputs, blocks, BLOCK)
        zero = unpacked(self.zero_points.reshape(outputs, -1), self.bits)[:, :blocks, None].astype(np.float64)
        return np.asarray((codes - zero) * self.scales[..., None], np.float64).reshape(outputs, -1)


def nearest(source: Floats, bits: int) -> Levels:
    """`source` [N, K] to the nearest of 2^bits levels between smallest and largest (zero among them) of each block."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, bits=bits)
    return Levels(*DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(source.T)))


def packed(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """uint8 [n, m] of `bits` each -> uint8 [n, m * bits / 8, rounded up]: of 4-bit numbers the first is the lower."""
    if bits == 8:
        return numbers
    even = np.pad(numbers, ((0, 0), (0, numbers.shape[1] % 2)))
    return np.asarray(even[:, ::2] | even[:, 1::2] << 4, np.uint8)


def unpacked(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """uint8 [n, m] of two 4-bit numbers each, the lower first -> uint8 [n, 2 m]; 8-bit ones as they are."""
    if bits == 8:
        return numbers
    return np.stack([numbers & 0x0F, numbers >> 4], axis=-1).reshape(len(numbers), -1)
