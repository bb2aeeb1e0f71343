"""The input of a convolution as rows that its weight multiplies, as if it were a linear layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def patches(x: Tensor, layer: Any, most: int) -> Tensor:
    """At most so many patches [n, in·kernel], spread evenly over the batch and the positions of the output.

    x: [batch, in, *size], what the layer (nn.Conv1d to nn.Conv3d of one group) is called with. Its output there is
    patch @ weight.flatten(1)ᵀ + bias (torch.nn.Unfold says the same of two dimensions).
    """
    spread = functional.pad(x, layer._reversed_padding_repeated_twice)  # torch's own numbers also for "same"
    for axis, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        spread = spread.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    places = 1 + len(layer.kernel_size)
    spread = spread.movedim(1, places)  # [batch, *positions, in, *kernel], still a view of x
    count = math.prod(spread.shape[:places])
    chosen = torch.arange(0, count, max(1, -(-count // most)), device=x.device)
    return spread[torch.unravel_index(chosen, spread.shape[:places])].flatten(1)
