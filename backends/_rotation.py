"""Rotation of the input axis in blocks, by Hadamard matrices (Sylvester's construction).

R has blocks H / √b on its diagonal; R = Rᵀ = R⁻¹, so that x Wᵀ = (x R) (W R)ᵀ. It spreads outliers of a block over
the block: every entry of x R is a mean of b entries with signs. Blocks, not the whole axis: a global rotation mixes
the blocks that share a scale (MR-GPTQ, arXiv 2509.23202; Block Rotation for MXFP4, arXiv 2511.04214).
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


@cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """[size, size] of ±1, float32, size a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def rotate(values: Tensor, block: int) -> Tensor:
    """values [..., in] · R in float32; twice is the identity up to rounding."""
    signs = hadamard(block, values.device)
    blocks = values.float().reshape(*values.shape[:-1], values.shape[-1] // block, block)
    return (blocks @ signs).mul_(1 / math.sqrt(block)).reshape(values.shape)


def rotate_hessian(hessian: Tensor, block: int) -> Tensor:
    """Rᵀ H R of a block-diagonal H [n, b, b], b a multiple of `block`."""
    return rotate(rotate(hessian, block).mT, block).mT


def rotate_second_moment(second_moment: Tensor, block: int) -> Tensor:
    """E[(x R)²] [in] of channels that are not correlated: every entry of R² is 1 / block."""
    means = second_moment.reshape(-1, block).mean(-1)
    return means.repeat_interleave(block)
