"""INT4: weights of 4-bit integers in groups of 64 along a row; 4.25 bits, 4.5 with zeros.

A group is symmetric (`zero: none`), or has a zero from its range (minmax) or from half-quadratic splitting (hqq); the
scale is that of the range (absmax), or a search finds both (mse). Errors of Gaussian weights in percent:

    zero    none    minmax  hqq
    absmax  10.8    9.0     8.6
    mse     9.0     8.2     8.2

Stored: two codes per byte, the even one in the low nibble. With `activations: int8` the input is quantized per token
as torchao does it (symmetric, amax / 127.5), and the product is emulated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from bitroute.backends._emulation import int8_tokens, product
from bitroute.backends._integers import Integers
from bitroute.backends.base import TensorSpec


@dataclass(frozen=True)
class Int4(Integers):
    name = "int4"
    bits = 4
    lowest_sqnr_db = 8.0

    activations: Literal["none", "int8"] = "none"

    def refuse_convolution(self) -> str | None:
        return None if self.activations == "none" else "of a convolution the activations cannot be quantized"

    def emulates(self, device: torch.device) -> bool:
        return self.activations != "none"

    def linear(self, x: Tensor, stored: Mapping[str, Tensor], weight: TensorSpec, bias: Tensor | None) -> Tensor:
        if self.activations == "none":
            return super().linear(x, stored, weight, bias)
        return self.multiplied(int8_tokens(x), stored, weight, bias, product(x.dtype), torch.float32)
