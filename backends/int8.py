"""INT8, symmetric, a scale per row, by torchao's Int8Tensor; weight-only or with dynamic activations.

s = max(amax / 127.5, 1.19e-7), q = round(w / s) clamped to [-128, 127], ŵ = q · s (torchao's symmetric mapping).
Weights of convolutions too, [out, in·kernel], where activations are not quantized.
That smallest scale is torchao's: rows whose largest weight is below about 1e-6 lose precision, below 6e-8 all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    PerRow,
)
from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

from bitroute.backends._elements import block_amax
from bitroute.backends._torchao import (
    COMPUTE_DTYPE,
    arithmetic_rows,
    native_record,
    refuse_dynamic_convolution,
    refuse_single_column,
)
from bitroute.backends.base import NONE, Backend, NativeRecord, Statistics, Survey, TensorSpec

SMALLEST_SCALE = torch.finfo(torch.float32).eps  # torchao's
LARGEST_SCALE = torch.finfo(COMPUTE_DTYPE).max / 128  # the code -128 must decode to a finite bf16


@dataclass(frozen=True)
class Int8(Backend):
    name = "int8"
    family = "torchao"
    needs = frozenset({"torchao"})
    lowest_sqnr_db = 15.0

    activations: Literal["none", "dynamic"] = "none"

    def refuse(self, weight: TensorSpec) -> str | None:
        return refuse_single_column(weight) or super().refuse(weight)

    def refuse_convolution(self) -> str | None:
        return refuse_dynamic_convolution(self.activations)

    def outputs(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows = weight.shape[0]
        return {
            "qdata": TensorSpec(weight.shape, torch.int8),
            "scale": TensorSpec((rows, 1), torch.float32),
            "zero_point": TensorSpec((rows, 1), torch.int8),
        }

    def encode(self, rows: Tensor, survey: Survey, statistics: Statistics = NONE) -> dict[str, Tensor]:
        rows = arithmetic_rows(rows)
        scale = (block_amax(rows).unsqueeze(1) / 127.5).clamp_(min=SMALLEST_SCALE).float()  # in bf16 of bf16 rows
        codes = rows.to(torch.float32, copy=True).mul_(1.0 / scale).round_().clamp_(-128, 127)
        zero_point = torch.zeros_like(scale, dtype=torch.int8)
        return {"qdata": codes.to(torch.int8), "scale": scale.clamp(max=LARGEST_SCALE), "zero_point": zero_point}

    def decode_rows(self, stored: Mapping[str, Tensor], weight: TensorSpec, start: int, stop: int) -> Tensor:
        return stored["qdata"][start:stop].float().mul_(stored["scale"][start:stop])

    def record(self, weight: TensorSpec) -> NativeRecord:
        stored = self.on_meta(weight)
        dynamic = self.activations == "dynamic"
        config = Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig(version=2)
        return native_record(self._tensor(stored, weight), config)

    def linear(self, x: Tensor, stored: Mapping[str, Tensor], weight: TensorSpec, bias: Tensor | None) -> Tensor:
        if self.activations == "none" or x.numel() == 0:
            return super().linear(x, stored, weight, bias)
        return _multiplied(x, stored["qdata"], stored["scale"], stored["zero_point"], bias)

    def _tensor(self, stored: Mapping[str, Tensor], weight: TensorSpec) -> Int8Tensor:
        dynamic = self.activations == "dynamic"
        return Int8Tensor(
            stored["qdata"],
            stored["scale"],
            [1, weight.shape[1]],
            COMPUTE_DTYPE,
            stored["zero_point"],
            act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow()) if dynamic else None,
        )


def _multiplied(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None) -> Tensor:
    """In INT8; dynamo cannot make torchao's tensor, but the compiler behind it can."""
    stored = {"qdata": qdata, "scale": scale, "zero_point": zero_point}
    weight = Int8("dynamic")._tensor(stored, TensorSpec(tuple(qdata.shape), COMPUTE_DTYPE))
    return functional.linear(x, weight, bias)


torch.compiler.allow_in_graph(_multiplied)  # type: ignore[no-untyped-call]
