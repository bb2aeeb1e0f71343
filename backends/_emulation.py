"""Products with quantized activations, emulated: the same on every device, and exact.

Both operands are decoded to float32 and never rounded again. The product runs in float32 with float32 accumulation,
also where torch was told to use TF32 or bf16 for float32, and inside autocast; the bias is added in float32, and the
result is cast to the dtype of the input once. It differs from the float64 product of the same operands by 1e-6 of its
norm at most. Graphs of torch.compile are the exception: they keep the precision that torch is set to.

Activations are quantized without a gradient. What a device computes by itself is left to torchao: INT8 everywhere, FP8
where torch._scaled_mm has it. In torchao's own containers NVFP4 and FP8 need such a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bitroute.backends.base import Multiply, Statistics
from bitroute.errors import BackendError, Problem


def product(dtype: torch.dtype) -> Multiply:
    """x [..., in] · weight [out, in]ᵀ + bias, of decoded float32 operands, in `dtype`."""

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.float()
        with torch.autocast(x.device.type, enabled=False), _full_precision(x.device):
            return functional.linear(x, weight, bias).to(dtype)

    return multiply


def int8_tokens(x: Tensor) -> Tensor:
    """x [..., in] as torchao's Int8Tensor makes it, a symmetric scale per token (amax / 127.5); float32."""
    from torchao.quantization import Int8Tensor, PerRow

    if x.numel() == 0:
        return x.float()
    quantized = Int8Tensor.from_hp(x.detach(), PerRow())
    decoded: Tensor = quantized.qdata.float().mul_(quantized.scale)
    return decoded


def largest_input(statistics: Statistics, backend: str) -> Tensor:
    """The largest magnitude that calibration saw in any channel, float32 [], for a scale that is stored.

    Raises:
        BackendError: calibration measured no absmax of the layer.
    """
    if statistics.absmax is None:
        raise BackendError(
            Problem(
                f"{backend} with static activations has no statistics to go by",
                got="no absmax for this layer",
                next_step="`quantize calibrate MODEL --prompts SET --out FILE`, then `--statistics FILE`",
            )
        )
    return statistics.absmax.float().amax()


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """float32 is multiplied as float32."""
    if torch.compiler.is_compiling():  # a graph cannot change a setting of the process
        yield
        return
    library: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    settings = library.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before
