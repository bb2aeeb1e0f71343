"""FP8 E4M3 with a scale per row or per tensor, by torchao's Float8Tensor; weight-only or with dynamic activations.

s = amax / 448, q = E4M3(w / s), ŵ = q · s. An all-zero row gets the scale 1e-12 / 448 where torchao gives NaN.
Weights of convolutions too, [out, in·kernel], where activations are not quantized.
Weight-only runs wherever bf16 runs; dynamic activations compute in FP8 (CPU, CUDA compute capability 8.9 or newer),
and are emulated elsewhere; static ones have a scale per tensor, from calibration, and are emulated everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8Tensor,
    Float8WeightOnlyConfig,
    PerRow,
    PerTensor,
)
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

from bitroute.backends import _elements
from bitroute.backends._elements import block_amax, largest, new_float32
from bitroute.backends._emulation import largest_input, product
from bitroute.backends._torchao import (
    COMPUTE_DTYPE,
    arithmetic_rows,
    native_record,
    refuse_dynamic_convolution,
    refuse_single_column,
)
from bitroute.backends.base import NONE, Backend, NativeRecord, Statistics, Survey, TensorSpec

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
INPUT_SCALE = "input_scale"
AMAX_FLOOR = 1e-12  # below it a row counts as zero; also the floor of a zero activation row


@dataclass(frozen=True)
class Float8(Backend):
    name = "float8"
    family = "torchao"
    needs = frozenset({"torchao"})
    lowest_sqnr_db = 20.0

    granularity: Literal["row", "tensor"] = "row"
    activations: Literal["none", "dynamic", "static"] = "none"

    @property
    def measured(self) -> frozenset[str]:
        return frozenset({"absmax"} if self.activations == "static" else ())

    def refuse(self, weight: TensorSpec) -> str | None:
        by_row = self.granularity == "row"
        return (refuse_single_column(weight) if by_row else None) or super().refuse(weight)

    def refuse_convolution(self) -> str | None:
        return refuse_dynamic_convolution(self.activations)

    def outputs(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        scales = weight.shape[0] if self.granularity == "row" else 1
        specs = {
            "qdata": TensorSpec(weight.shape, E4M3),
            "scale": TensorSpec((scales, 1), torch.float32),
        }
        return specs | {INPUT_SCALE: TensorSpec((), torch.float32)} if self.activations == "static" else specs

    def survey(self, blocks: Iterable[Tensor], weight: TensorSpec, statistics: Statistics = NONE) -> Survey:
        outputs = {}
        if self.activations == "static":
            outputs[INPUT_SCALE] = largest_input(statistics, self.name).clamp(min=AMAX_FLOOR) / E4M3_MAX
        if self.granularity == "row":
            return Survey(outputs=outputs)
        amax = largest(arithmetic_rows(rows) for rows in blocks).reshape(1, 1)
        scale = Float8Tensor.from_hp(amax, E4M3, PerTensor(), hp_value_lb=AMAX_FLOOR).scale
        return Survey(outputs={**outputs, "scale": scale})

    def encode(self, rows: Tensor, survey: Survey, statistics: Statistics = NONE) -> dict[str, Tensor]:
        rows = arithmetic_rows(rows)
        if self.granularity == "tensor":
            return {"qdata": _quotients(rows, survey.outputs["scale"])}
        scale = (block_amax(rows).unsqueeze(1).clamp_(min=AMAX_FLOOR) / E4M3_MAX).float()  # in bf16 of bf16 rows
        return {"qdata": _quotients(rows, scale), "scale": scale}

    def decode_rows(self, stored: Mapping[str, Tensor], weight: TensorSpec, start: int, stop: int) -> Tensor:
        scale = stored["scale"][start:stop] if self.granularity == "row" else stored["scale"]
        return new_float32(stored["qdata"][start:stop]).mul_(scale)

    def record(self, weight: TensorSpec) -> NativeRecord | None:
        """None for static activations: torchao's Float8Tensor has no scale for them."""
        if self.activations == "static":
            return None
        stored = self.on_meta(weight)
        if self.activations == "none":
            return native_record(self._tensor(stored, weight), Float8WeightOnlyConfig())
        config = Float8DynamicActivationFloat8WeightConfig(
            granularity=self._granularity(), activation_value_lb=AMAX_FLOOR
        )
        return native_record(self._tensor(stored, weight), config)

    def gpu_to_compute(self) -> str:
        return "" if self.activations != "dynamic" else "CUDA compute capability 8.9 (Ada, RTX 40) or MI300"

    def emulates(self, device: torch.device) -> bool:
        """torch._scaled_mm multiplies FP8 on the CPU and on the GPUs that have it."""
        if self.activations != "dynamic" or device.type == "cpu":
            return self.activations == "static"
        return device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)

    def linear(self, x: Tensor, stored: Mapping[str, Tensor], weight: TensorSpec, bias: Tensor | None) -> Tensor:
        if self.activations == "none" or x.numel() == 0:
            return super().linear(x, stored, weight, bias)
        if not self._in_float8(x, weight):
            return self.multiplied(self._quantized(x, stored), stored, weight, bias, product(x.dtype), torch.float32)
        return _multiplied(x, stored["qdata"], stored["scale"], bias, self.granularity)

    def _in_float8(self, x: Tensor, weight: TensorSpec) -> bool:
        """Off the CPU torch._scaled_mm takes sides in multiples of 16, and with scales of rows it makes bf16 only."""
        if self.emulates(x.device):
            return False
        sixteens = weight.shape[0] % 16 == weight.shape[1] % 16 == 0
        makes_dtype = x.dtype == torch.bfloat16 or self.granularity == "tensor"
        return x.device.type == "cpu" or (sixteens and makes_dtype)

    def _quantized(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """x [..., in] as torchao makes it, or with the scale that is stored; float32, without gradient."""
        if self.activations == "static":
            scale = stored[INPUT_SCALE]
            return (x.detach().float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3).float().mul_(scale)
        found = Float8Tensor.from_hp(x.detach(), E4M3, self._granularity(), hp_value_lb=AMAX_FLOOR)
        decoded: Tensor = found.dequantize(torch.float32)
        return decoded

    def _granularity(self) -> PerRow | PerTensor:
        return PerRow() if self.granularity == "row" else PerTensor()

    def _tensor(self, stored: Mapping[str, Tensor], weight: TensorSpec) -> Float8Tensor:
        """torchao's tensor over the stored parts; mm_config may not be null when activations are quantized."""
        block = [1, weight.shape[1]] if self.granularity == "row" else list(weight.shape)
        if self.activations == "none":
            return Float8Tensor(stored["qdata"], stored["scale"], block_size=block, dtype=COMPUTE_DTYPE)
        mm_config = Float8MMConfig(use_fast_accum=True)
        activations = QuantizeTensorToFloat8Kwargs(
            granularity=self._granularity(), mm_config=mm_config, hp_value_lb=AMAX_FLOOR
        )
        return Float8Tensor(
            stored["qdata"],
            stored["scale"],
            block_size=block,
            mm_config=mm_config,
            act_quant_kwargs=activations,
            dtype=COMPUTE_DTYPE,
        )


def _quotients(rows: Tensor, scale: Tensor) -> Tensor:
    """Rounded; a scale that was itself rounded down leaves at most 449, which is rounded to 448."""
    return _elements.E4M3.store(rows.to(torch.float32, copy=True).div_(scale))


def _multiplied(
    x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, granularity: Literal["row", "tensor"]
) -> Tensor:
    """In FP8; dynamo cannot make torchao's tensor, but the compiler behind it can."""
    backend, weight = Float8(granularity, "dynamic"), TensorSpec(tuple(qdata.shape), COMPUTE_DTYPE)
    return functional.linear(x, backend._tensor({"qdata": qdata, "scale": scale}, weight), bias)


torch.compiler.allow_in_graph(_multiplied)  # type: ignore[no-untyped-call]
