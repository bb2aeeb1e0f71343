"""Smoothing: channels with large inputs get larger weights and smaller inputs, x Wᵀ = (x S⁻¹) (W S)ᵀ.

Source: SmoothQuant, arXiv 2211.10438, equation 4; with weights alone in few bits the same protects the columns that
matter (AWQ, arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

LARGEST_LOG = 20.0  # of a scale; beyond, float16 inputs would overflow or vanish anyway


def smoothing(blocks: Iterable[Tensor], absmax: Tensor, alpha: float) -> Tensor:
    """max|x|^α / max|w|^(1 - α) for each channel [in], float32, with geometric mean 1.

    blocks: the weight by rows [n, in]. absmax: max|x| [in]. Channels without an input or a weight stay as they are.
    """
    weights = torch.stack([rows.float().abs().amax(0) for rows in blocks]).amax(0)
    inputs = absmax.to(weights.device)
    logs = alpha * inputs.log() - (1 - alpha) * weights.log()
    known = (inputs > 0) & (weights > 0) & logs.isfinite()
    mean = logs[known].mean().item() if known.any() else 0.0
    return torch.where(known, logs - mean, 0.0).clamp_(-LARGEST_LOG, LARGEST_LOG).exp_()


def divide_hessian(hessian: Tensor, smooth: Tensor) -> Tensor:
    """S⁻¹ H S⁻¹ of a block-diagonal H [n, b, b]."""
    scales = smooth.to(hessian.device).reshape(hessian.shape[:2])
    return (hessian / scales.unsqueeze(1)).div_(scales.unsqueeze(2))
