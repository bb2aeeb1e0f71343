"""The block formats of GGUF files, decoded by torch: blocks of 32 weights, or of 256 in the K formats.

A block is stored whole, scales and codes together. Source of the layouts: ggml-common.h of llama.cpp, and its python
package gguf 0.19 (quants.py), whose values these are bit for bit where float32 holds them exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**20  # weights decoded at a time
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
K_BLOCK = 256


@dataclass(frozen=True)
class BlockFormat:
    name: str
    weights: int  # of a block
    size_bytes: int  # of a block
    decode: Callable[[Tensor], Tensor]  # [blocks, size_bytes] of uint8 → [blocks, weights] of float32


def decode_blocks(stored: Tensor, found: BlockFormat) -> Tensor:
    """[blocks, size_bytes] of uint8 → float32, one row a block; a part at a time, for the temporaries."""
    decoded = torch.empty(len(stored), found.weights)
    step = CHUNK // found.weights
    for start in range(0, len(stored), step):
        decoded[start : start + step] = found.decode(stored[start : start + step])
    return decoded


def _half(stored: Tensor) -> Tensor:
    """Pairs of bytes as fp16, in float32."""
    return stored.contiguous().view(torch.float16).float()


def _signed(stored: Tensor) -> Tensor:
    return stored.contiguous().view(torch.int8)


def _fields(stored: Tensor, groups: int, bits: int) -> Tensor:
    """[n, bytes] → [n, groups, 8 / bits, bytes / groups]: the lowest bits of all bytes of a group, then the next."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return stored.reshape(len(stored), groups, 1, -1) >> shifts & (1 << bits) - 1


def _nibbles(stored: Tensor) -> Tensor:
    return _fields(stored, 1, 4).flatten(1)


def _fifth_bits(stored: Tensor) -> Tensor:
    """[n, 4] → [n, 32], each 0 or 16: bit i of the four bytes belongs to weight i."""
    return (stored[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1) << 4


def _q8_0(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * _signed(b[:, 2:])


def _q4_0(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * (_nibbles(b[:, 2:]).to(torch.int8) - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * _nibbles(b[:, 4:]) + _half(b[:, 2:4])


def _q5_0(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * ((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).to(torch.int8) - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * (_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])) + _half(b[:, 2:4])


def _iq4_nl(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * torch.tensor(IQ4_VALUES)[_nibbles(b[:, 2:]).int()]


def _scales_and_mins(b: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 12] → the 6-bit scales and minima [n, 8, 1] of the eight parts of a block."""
    first, second, rest = b[:, :4], b[:, 4:8], b[:, 8:]
    scales = torch.cat([first & 63, rest & 15 | first >> 2 & 48], dim=1)
    minima = torch.cat([second & 63, rest >> 4 | second >> 2 & 48], dim=1)
    return scales[:, :, None], minima[:, :, None]


def _affine(b: Tensor, codes: Tensor) -> Tensor:
    """What Q4_K and Q5_K share; codes [n, 8, 32]."""
    scales, minima = _scales_and_mins(b[:, 4:16])
    scale, minimum = _half(b[:, :2])[:, :, None] * scales, _half(b[:, 2:4])[:, :, None] * minima
    return (scale * codes - minimum).flatten(1)


def _q4_k(b: Tensor) -> Tensor:
    return _affine(b, _fields(b[:, 16:], 4, 4).reshape(-1, 8, 32))


def _q5_k(b: Tensor) -> Tensor:
    high = _fields(b[:, 16:48], 1, 1).reshape(-1, 8, 32)
    return _affine(b, _fields(b[:, 48:], 4, 4).reshape(-1, 8, 32) | high << 4)


def _q6_k(b: Tensor) -> Tensor:
    low, high = _fields(b[:, :128], 2, 4).reshape(-1, 8, 32), _fields(b[:, 128:192], 2, 2).reshape(-1, 8, 32)
    codes = (low | high << 4).to(torch.int8).reshape(-1, 16, 16) - 32
    scales = _half(b[:, 208:]) * _signed(b[:, 192:208])
    return (scales[:, :, None] * codes).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    high = _fields(b[:, :32], 1, 1).reshape(-1, 16, 16)
    low = _fields(b[:, 32:96], 2, 2).reshape(-1, 16, 16)
    codes = low.to(torch.int8) - ((high ^ 1) << 2).to(torch.int8)
    low_scales, high_scales = _fields(b[:, 96:104], 1, 4).flatten(1), _fields(b[:, 104:108], 1, 2).flatten(1)
    scales = _half(b[:, 108:]) * ((low_scales | high_scales << 4).to(torch.int8) - 32)
    return (scales[:, :, None] * codes).flatten(1)


def _q2_k(b: Tensor) -> Tensor:
    scales, minima = _half(b[:, 80:82]) * (b[:, :16] & 15), _half(b[:, 82:84]) * (b[:, :16] >> 4)
    codes = _fields(b[:, 16:80], 2, 2).reshape(-1, 16, 16)
    return (scales[:, :, None] * codes - minima[:, :, None]).flatten(1)


def _iq4_xs(b: Tensor) -> Tensor:
    high = (b[:, 2:4, None] >> torch.arange(0, 8, 2, dtype=torch.uint8) & 3).flatten(1)
    low = torch.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], dim=2).flatten(1)
    scales = _half(b[:, :2]) * ((low | high << 4).to(torch.int8) - 32)
    values = torch.tensor(IQ4_VALUES)[_fields(b[:, 8:], 8, 4).reshape(-1, 8, 32).int()]
    return (scales[:, :, None] * values).flatten(1)


FORMATS: Mapping[int, BlockFormat] = {  # by their number in a file
    2: BlockFormat("Q4_0", 32, 18, _q4_0), 3: BlockFormat("Q4_1", 32, 20, _q4_1),
    6: BlockFormat("Q5_0", 32, 22, _q5_0), 7: BlockFormat("Q5_1", 32, 24, _q5_1),
    8: BlockFormat("Q8_0", 32, 34, _q8_0), 10: BlockFormat("Q2_K", K_BLOCK, 84, _q2_k),
    11: BlockFormat("Q3_K", K_BLOCK, 110, _q3_k), 12: BlockFormat("Q4_K", K_BLOCK, 144, _q4_k),
    13: BlockFormat("Q5_K", K_BLOCK, 176, _q5_k), 14: BlockFormat("Q6_K", K_BLOCK, 210, _q6_k),
    20: BlockFormat("IQ4_NL", 32, 18, _iq4_nl), 23: BlockFormat("IQ4_XS", K_BLOCK, 136, _iq4_xs),
}  # fmt: skip
PLAIN: Mapping[int, torch.dtype] = {
    0: torch.float32, 1: torch.float16, 24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64,
    28: torch.float64, 30: torch.bfloat16,
}  # fmt: skip
