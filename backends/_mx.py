"""OCP Microscaling: blocks of 32 along the input axis that share a power-of-two scale (E8M0).

ŵ = element · 2^(byte - 127). The byte follows from the block's amax by one of torchao 0.18's rules
(torchao/prototype/mx_formats/mx_tensor.py, to_mx), bit for bit, or by our search:

    absmax  floor(log2 amax) - emax, the OCP default; the largest elements may saturate (torchao FLOOR)
    even    the same after rounding amax to the element's mantissa (EVEN)
    ceil    ceil(log2 amax) - emax (CEIL)
    rceil   ceil(log2(amax / element max)), nothing saturates; NVIDIA's rule (RCEIL)
    mse     of absmax, one more and one less (two, where weighted) the least squared error, weighted by the mean
            square of each input where calibration measured it; absmax unless another is strictly better. Two more
            are never better: what their elements reach below the block's amax, those of one more reach as well

An all-zero block has byte 0. Two things are as in torchao: blocks below 2^-124 encode by 2^-126 where byte 0
decodes by 2^-127, and rceil encodes such blocks unscaled. One is not: where the largest elements of a block, near
the end of float32, decode to infinity in torchao, the block has the scale of absmax here, and they saturate.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from bitroute.backends._elements import (
    E2M1,
    E4M3,
    E5M2,
    Element,
    block_amax,
    block_weights,
    by_row_blocks,
    in_blocks,
    least_error,
    squared_error,
)
from bitroute.backends._emulation import product
from bitroute.backends._rounded import Rounded, Scales
from bitroute.backends.base import NONE, NativeRecord, Statistics, Survey, TensorSpec

BLOCK = 32
E8M0 = torch.float8_e8m0fnu
_BIAS = 127
_INFINITE = 255  # the biased exponent of infinity in float32
_LOWER, _LOWER_WEIGHTED = (1,), (1, 2)  # steps below absmax; the weights of the largest elements may be next to none

_ACTIVATIONS = {"mxfp4": E2M1, "mxfp8": E4M3}
_TORCHAO_DTYPES = {E2M1: torch.float4_e2m1fn_x2, E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}

Rule = Literal["absmax", "even", "ceil", "rceil", "mse"]


@dataclass(frozen=True)
class MX(Rounded):
    """What the MX formats share; a format adds its elements and names the activations it knows.

    Activations are quantized by the rceil rule, and emulated.
    """

    family = "torchao"

    scale: Rule = "absmax"
    activations: Literal["none", "mxfp4", "mxfp8"] = "none"

    @property
    @abstractmethod
    def weight_element(self) -> Element: ...

    @property
    def activation_element(self) -> Element | None:
        return _ACTIVATIONS.get(self.activations)

    def refuse(self, weight: TensorSpec) -> str | None:
        columns = weight.shape[1]
        if columns % BLOCK:
            return f"{columns} input features are not a multiple of {BLOCK}"
        return super().refuse(weight)

    def outputs(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape
        element = self.weight_element
        return {
            "qdata": TensorSpec((rows, element.columns(columns)), element.dtype),
            "scale": TensorSpec((rows, columns // BLOCK), E8M0),
        }

    def scales(self, rows: Tensor, survey: Survey, statistics: Statistics = NONE) -> Scales:
        """Biased exponents, int32."""
        blocks = in_blocks(rows, BLOCK)
        if self.scale != "mse":
            return (_exponents(block_amax(blocks), self.weight_element, self.scale),)
        weights = block_weights(statistics.second_moment, BLOCK, rows.device)
        return (_search(blocks, self.weight_element, weights),)

    def nearest(self, weights: Tensor, scales: Scales, survey: Survey) -> Tensor:
        elements = self.weight_element.nearest(weights * _reciprocals(scales[0], self.scale))
        return elements.mul_(scales[0].to(torch.uint8).view(E8M0).float())

    def store(self, rows: Tensor, scales: Scales, survey: Survey) -> dict[str, Tensor]:
        scaled = in_blocks(rows, BLOCK).mul(_reciprocals(scales[0], self.scale).unsqueeze(-1))
        return {"qdata": self.weight_element.store(scaled).flatten(1), "scale": scales[0].to(torch.uint8).view(E8M0)}

    def decode_rows(self, stored: Mapping[str, Tensor], weight: TensorSpec, start: int, stop: int) -> Tensor:
        elements = in_blocks(self.weight_element.load(stored["qdata"][start:stop]), BLOCK)
        return elements.mul_(stored["scale"][start:stop].float().unsqueeze(-1)).flatten(1)

    def record(self, weight: TensorSpec) -> NativeRecord | None:
        """torchao's MXTensor with emulated activations; None without them, as torchao has no such forward.

        Nor can it transpose a single row. Its config knows one element for both sides; other pairs have an
        empty one and run by their header.
        """
        weight_dtype = _TORCHAO_DTYPES.get(self.weight_element)
        if weight_dtype is None or self.activation_element is None or weight.shape[0] == 1:
            return None
        from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
        from torchao.quantization.quantize_.common import KernelPreference

        from bitroute.backends._torchao import COMPUTE_DTYPE, native_record

        activation_dtype = _TORCHAO_DTYPES[self.activation_element]
        shared = {
            "block_size": BLOCK,
            "kernel_preference": KernelPreference.EMULATED,
            "scaling_mode": ScaleCalculationMode.RCEIL,
        }
        tensor = MXTensor(
            **self.on_meta(weight),
            elem_dtype=weight_dtype,
            block_size=BLOCK,
            orig_dtype=COMPUTE_DTYPE,
            kernel_preference=KernelPreference.EMULATED,
            act_quant_kwargs=QuantizeTensorToMXKwargs(elem_dtype=activation_dtype, **shared),
            is_swizzled_scales=False,
        )
        config = MXDynamicActivationMXWeightConfig(
            activation_dtype=activation_dtype, weight_dtype=activation_dtype, **shared
        )
        record = native_record(tensor, config)
        return record if activation_dtype == weight_dtype else replace(record, config={})

    def emulates(self, device: torch.device) -> bool:
        return self.activation_element is not None

    def linear(self, x: Tensor, stored: Mapping[str, Tensor], weight: TensorSpec, bias: Tensor | None) -> Tensor:
        if self.activation_element is None:
            return super().linear(x, stored, weight, bias)
        inputs = quantized(x, self.activation_element)
        return self.multiplied(inputs, stored, weight, bias, product(x.dtype), torch.float32)


def quantized(x: Tensor, element: Element) -> Tensor:
    """x [..., in] as MX with the rceil rule makes it, float32, without its gradient."""

    def through(rows: Tensor) -> Tensor:
        blocks = in_blocks(rows, BLOCK)
        exponents = _exponents(block_amax(blocks), element, "rceil")
        elements = element.nearest(blocks.mul(_reciprocals(exponents, "rceil").unsqueeze(-1)))
        scales = exponents.to(torch.uint8).view(E8M0).float()
        return elements.mul_(scales.unsqueeze(-1)).flatten(1)

    return by_row_blocks(x.detach().reshape(-1, x.shape[-1]), through).reshape(x.shape)


def _exponents(amax: Tensor, element: Element, rule: str) -> Tensor:
    """Biased exponent of each block's scale, int32 in [0, 253]."""
    if rule == "rceil":
        found = (amax / element.max).log2_().ceil_().clamp_(min=-_BIAS).add_(_BIAS).to(torch.int32)
    else:
        round_up = {"absmax": 0, "even": _half_step(element), "ceil": (1 << 23) - 1}[rule]
        found = ((amax.view(torch.int32) + round_up) >> 23).sub_(element.max_exponent).clamp_(min=0)
    return torch.minimum(found, _largest_exponents(amax, element))


def _largest_exponents(amax: Tensor, element: Element) -> Tensor:
    """Biased exponents beyond which the block's largest element decodes to infinity.

    With the exponent 255 - emax the elements keep the power of two of their weights, which may be 2^127; what
    their mantissa rounds up from there is beyond float32.
    """
    rounded = (amax.view(torch.int32) + _half_step(element)) >> 23
    return (rounded < _INFINITE).int().add_(_INFINITE - 1 - element.max_exponent)


def _half_step(element: Element) -> int:
    """Half of the last place of the element's mantissa, in the bits of a float32."""
    return 1 << (22 - element.mantissa_bits)


def _reciprocals(exponents: Tensor, rule: str) -> Tensor:
    """2^(127 - exponent), float32, with torchao's two exceptions for exponent 0."""
    powers = ((2 * _BIAS - exponents.clamp(min=1)) << 23).view(torch.float32)
    return powers.masked_fill_(exponents == 0, 1.0) if rule == "rceil" else powers


def _search(blocks: Tensor, element: Element, weights: Tensor | None) -> Tensor:
    amax = block_amax(blocks)
    floor, largest = _exponents(amax, element, "absmax"), _largest_exponents(amax, element)
    units = squared_error(blocks, element, weights)

    def error(exponents: Tensor) -> Tensor:
        return torch.ldexp(units(_reciprocals(exponents, "mse")), 2 * (exponents.clamp(min=1) - floor.clamp(min=1)))

    lower = _LOWER if weights is None else _LOWER_WEIGHTED
    others = [torch.minimum(floor + 1, largest), *((floor - step).clamp_(min=0) for step in lower)]
    return least_error(floor, others, error)
