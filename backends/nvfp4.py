"""NVFP4: E2M1 elements, an E4M3 scale per 16 of them along the input axis and a float32 scale per tensor.

g = amax / (448 · 6), s = E4M3(block amax / 6 / g) in [2^-6, 448], q = E2M1(w · (1 / g) / s), ŵ = q · (g · s):
bit for bit torchao 0.18's two-level NVFP4Tensor (torchao/prototype/mx_formats/nvfp4_tensor.py), except that g
is at least 2^-120, so that a tensor of zeros decodes to zeros where torchao gives NaN. The block scales:

    absmax          as above
    mse             of the E4M3 numbers from 2 below s to 6 above the one with the least squared error,
                    weighted by the mean square of each input where calibration measured it; s unless
                    another is strictly better
    four-over-six   g = amax / (256 · 6), and per block s or 1.5 · s, which maps amax to 4 instead of 6,
                    whichever has the lower squared error (arXiv 2512.02010)
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from bitroute.backends._elements import (
    E2M1,
    E4M3,
    block_amax,
    block_weights,
    by_row_blocks,
    in_blocks,
    largest,
    least_error,
    squared_error,
)
from bitroute.backends._emulation import largest_input, product
from bitroute.backends._rounded import Rounded, Scales
from bitroute.backends.base import NONE, NativeRecord, Statistics, Survey, TensorSpec

BLOCK = 16
INPUT_SCALE = "act_per_tensor_scale"  # torchao's name
SMALLEST_BLOCK_SCALE = 2.0**-6  # E4M3's smallest normal number
SMALLEST_TENSOR_SCALE = 2.0**-120  # 1 / (tensor scale · block scale) must stay finite
SEARCH = (-1, 1, -2, 2, 3, 4, 5, 6, 7)  # steps of the E4M3 scale
SEARCH_WEIGHTED = (*SEARCH, -4, -10)  # the largest element may have next to no weight


@dataclass(frozen=True)
class NVFP4(Rounded):
    """NVFP4 weights, and activations if asked, emulated.

    Their tensor scale is that of each input's own amax (nvfp4), or of the largest input in calibration (static).
    """

    name = "nvfp4"
    family = "torchao"
    needs = frozenset({"torchao"})
    lowest_sqnr_db = 10.0

    scale: Literal["absmax", "mse", "four-over-six"] = "absmax"
    activations: Literal["none", "nvfp4", "static"] = "none"

    @property
    def measured(self) -> frozenset[str]:
        return frozenset({"absmax"} if self.activations == "static" else ())

    def refuse(self, weight: TensorSpec) -> str | None:
        columns = weight.shape[1]
        if columns % BLOCK:
            return f"{columns} input features are not a multiple of {BLOCK}"
        return super().refuse(weight)

    def outputs(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape
        specs = {
            "qdata": TensorSpec((rows, E2M1.columns(columns)), E2M1.dtype),
            "scale": TensorSpec((rows, columns // BLOCK), E4M3.dtype),
            "per_tensor_scale": TensorSpec((), torch.float32),
        }
        return specs | {INPUT_SCALE: TensorSpec((), torch.float32)} if self.activations == "static" else specs

    def survey(self, blocks: Iterable[Tensor], weight: TensorSpec, statistics: Statistics = NONE) -> Survey:
        if self.scale == "mse":
            amax, least = _extremes(block_amax(in_blocks(rows, BLOCK)) for rows in blocks)
        else:
            amax = largest(blocks)
        scale = _tensor_scale(amax, 256.0 if self.scale == "four-over-six" else E4M3.max)
        if self.scale == "mse" and not _to_six(least, 2 * scale) < SMALLEST_BLOCK_SCALE:  # no block would be starved
            scale = 2 * scale
        outputs = {"per_tensor_scale": scale}
        if self.activations == "static":
            outputs[INPUT_SCALE] = _tensor_scale(largest_input(statistics, self.name), E4M3.max)
        return Survey(outputs=outputs)

    def scales(self, rows: Tensor, survey: Survey, statistics: Statistics = NONE) -> Scales:
        tensor_scale = survey.outputs["per_tensor_scale"]
        blocks = in_blocks(rows, BLOCK)
        ideal = _ideal_scales(blocks, tensor_scale)
        plain = _e4m3(ideal)
        if self.scale == "absmax":
            return (plain,)
        weights = block_weights(statistics.second_moment, BLOCK, rows.device)
        others = self._candidates(ideal, plain, SEARCH if weights is None else SEARCH_WEIGHTED)
        return (_least_error(blocks, tensor_scale, plain, others, weights),)

    def nearest(self, weights: Tensor, scales: Scales, survey: Survey) -> Tensor:
        tensor_scale = survey.outputs["per_tensor_scale"]
        elements = E2M1.nearest(weights * _reciprocals(scales[0], tensor_scale))
        return elements.mul_(tensor_scale * scales[0])

    def store(self, rows: Tensor, scales: Scales, survey: Survey) -> dict[str, Tensor]:
        reciprocals = _reciprocals(scales[0], survey.outputs["per_tensor_scale"])
        qdata = E2M1.store(in_blocks(rows, BLOCK) * reciprocals.unsqueeze(-1))
        return {"qdata": qdata.flatten(1), "scale": scales[0].to(E4M3.dtype)}

    def decode_rows(self, stored: Mapping[str, Tensor], weight: TensorSpec, start: int, stop: int) -> Tensor:
        scales = E4M3.load(stored["scale"][start:stop]).mul_(stored["per_tensor_scale"])
        elements = in_blocks(E2M1.load(stored["qdata"][start:stop]), BLOCK)
        return elements.mul_(scales.unsqueeze(-1)).flatten(1)

    def record(self, weight: TensorSpec) -> NativeRecord | None:
        """None for quantized activations where torch's FP4 product refuses the shape.

        torch._scaled_mm wants outputs and packed inputs in multiples of 16, and packs two inputs to a byte.
        """
        from torchao.prototype.mx_formats import (
            NVFP4DynamicActivationNVFP4WeightConfig,
            NVFP4WeightOnlyConfig,
        )
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, QuantizeTensorToNVFP4Kwargs

        from bitroute.backends._torchao import COMPUTE_DTYPE, native_record

        rows, columns = weight.shape
        quantized_activations, dynamic = self.activations != "none", self.activations == "nvfp4"
        if quantized_activations and (rows % 16 or columns % 32):
            return None
        config = (
            NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False, use_dynamic_per_tensor_scale=dynamic)
            if quantized_activations
            else NVFP4WeightOnlyConfig()
        )
        activations = QuantizeTensorToNVFP4Kwargs(use_dynamic_per_tensor_scale=dynamic)
        stored = self.on_meta(weight)
        tensor = NVFP4Tensor(
            **stored,
            block_size=BLOCK,
            orig_dtype=COMPUTE_DTYPE,
            act_quant_kwargs=activations if quantized_activations else None,
        )
        return native_record(tensor, config)

    def gpu_to_compute(self) -> str:
        return "" if self.activations == "none" else "CUDA compute capability 10.0 (Blackwell)"

    def emulates(self, device: torch.device) -> bool:
        return self.activations != "none"

    def linear(self, x: Tensor, stored: Mapping[str, Tensor], weight: TensorSpec, bias: Tensor | None) -> Tensor:
        if self.activations == "none":
            return super().linear(x, stored, weight, bias)
        inputs = quantized(x, stored.get(INPUT_SCALE))
        return self.multiplied(inputs, stored, weight, bias, product(x.dtype), torch.float32)

    def _candidates(self, ideal: Tensor, plain: Tensor, steps: tuple[int, ...]) -> Iterator[Tensor]:
        """The E4M3 block scales to try beside the plain ones, as float32."""
        if self.scale == "four-over-six":
            yield _e4m3(ideal * 1.5)
        else:
            codes = plain.to(E4M3.dtype).view(torch.uint8).to(torch.int16)
            lowest, highest = _code(SMALLEST_BLOCK_SCALE), _code(E4M3.max)
            yield from (E4M3.load((codes + step).clamp_(lowest, highest).to(torch.uint8)) for step in steps)


def quantized(x: Tensor, tensor_scale: Tensor | None = None) -> Tensor:
    """x [..., in] as NVFP4 with a tensor scale, or one from its own amax, makes it; float32, without gradient."""
    if x.numel() == 0:
        return x.float()
    if tensor_scale is None:
        tensor_scale = _tensor_scale(x.detach().abs().amax(), E4M3.max)

    def through(rows: Tensor) -> Tensor:
        blocks = in_blocks(rows, BLOCK)
        scales = _e4m3(_ideal_scales(blocks, tensor_scale))
        elements = E2M1.nearest(blocks * _reciprocals(scales, tensor_scale).unsqueeze(-1))
        return elements.mul_((tensor_scale * scales).unsqueeze(-1)).flatten(1)

    return by_row_blocks(x.detach().reshape(-1, x.shape[-1]), through).reshape(x.shape)


def _least_error(
    blocks: Tensor, tensor_scale: Tensor, plain: Tensor, others: Iterable[Tensor], weights: Tensor | None
) -> Tensor:
    units = squared_error(blocks, E2M1, weights)

    def error(scales: Tensor) -> Tensor:
        return units(_reciprocals(scales, tensor_scale)).mul_(scales).mul_(scales)

    return least_error(plain, others, error)


def _extremes(amaxes: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The largest amax of all blocks, and the least of those that are not zero, or infinity."""
    pairs = ((found.amax(), found.masked_fill(found == 0, torch.inf).amin()) for found in amaxes)
    return functools.reduce(lambda one, two: (torch.maximum(one[0], two[0]), torch.minimum(one[1], two[1])), pairs)


def _tensor_scale(amax: Tensor, largest_block_scale: float) -> Tensor:
    return (amax.float() / (largest_block_scale * E2M1.max)).clamp_(min=SMALLEST_TENSOR_SCALE)


def _ideal_scales(blocks: Tensor, tensor_scale: Tensor) -> Tensor:
    return _to_six(block_amax(blocks), tensor_scale)


def _to_six(amaxes: Tensor, tensor_scale: Tensor) -> Tensor:
    """Block scales before rounding: amax → 6."""
    return amaxes / E2M1.max / tensor_scale


def _reciprocals(scales: Tensor, tensor_scale: Tensor) -> Tensor:
    """1 / (tensor scale · block scale) in torchao's order of operations."""
    return (1.0 / tensor_scale) / scales


def _e4m3(scales: Tensor) -> Tensor:
    return E4M3.nearest(scales.clamp(min=SMALLEST_BLOCK_SCALE))


def _code(scale: float) -> int:
    return int(torch.tensor(scale).to(E4M3.dtype).view(torch.uint8))
