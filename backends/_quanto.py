"""What the optimum-quanto formats share: arithmetic in bf16, and quanto's names in a checkpoint.

quanto quantizes a model in the dtype it was loaded in, and its scales have that dtype; here that is bf16
whatever the source, since the loaded layer computes in it. Source: optimum-quanto 0.2.7, nn/qmodule.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from optimum.quanto import AbsmaxOptimizer, quantize_weight
from pydantic.dataclasses import dataclass
from torch import Tensor

from bitroute.backends._elements import new_float32
from bitroute.backends.base import NONE, Backend, NativeRecord, Statistics, Survey, TensorSpec, cast

COMPUTE_DTYPE = torch.bfloat16
ACTIVATION_SCALES = (
    "input_scale",
    "output_scale",
)  # quanto stores them, and they are 1, with plain activations


@dataclass(frozen=True)
class Quanto(Backend):
    family = "quanto"
    needs = frozenset({"optimum-quanto"})
    weights_dtype: ClassVar[str]  # as diffusers' QuantoConfig spells it
    names: ClassVar[Mapping[str, str]] = {"data": "weight._data", "scale": "weight._scale"}

    def refuse(self, weight: TensorSpec) -> str | None:
        """quanto takes a single row for a whole tensor and gives it scales of another shape."""
        if weight.shape[0] == 1:
            return "optimum-quanto scales rows, and this layer has one output"
        return super().refuse(weight)

    def outputs(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        return {suffix: TensorSpec((), COMPUTE_DTYPE) for suffix in ACTIVATION_SCALES}

    def survey(self, blocks: Iterable[Tensor], weight: TensorSpec, statistics: Statistics = NONE) -> Survey:
        return Survey(outputs={suffix: torch.ones((), dtype=COMPUTE_DTYPE) for suffix in ACTIVATION_SCALES})

    def record(self, weight: TensorSpec) -> NativeRecord:
        names = {**self.names, **{suffix: suffix for suffix in ACTIVATION_SCALES}}
        return NativeRecord(names=names, config={"quant_method": "quanto", "weights_dtype": self.weights_dtype})


@dataclass(frozen=True)
class QuantoByte(Quanto):
    """8 bits, symmetric, a scale per row: s = amax / qmax, q = w / s rounded, ŵ = q · s."""

    qtype: ClassVar[Any]

    def outputs(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        return {
            "data": TensorSpec(weight.shape, self.qtype.dtype),
            "scale": TensorSpec((weight.shape[0], 1), COMPUTE_DTYPE),
            **super().outputs(weight),
        }

    def encode(self, rows: Tensor, survey: Survey, statistics: Statistics = NONE) -> dict[str, Tensor]:
        rows = cast(rows, COMPUTE_DTYPE)
        scale = AbsmaxOptimizer()(rows, qtype=self.qtype, axis=0)
        encoded = quantize_weight(rows, qtype=self.qtype, axis=0, scale=divisor(scale), optimized=False)
        return {"data": encoded._data, "scale": scale.reshape(-1, 1)}  # of a block of one row it is a scalar

    def decode_rows(self, stored: Mapping[str, Tensor], weight: TensorSpec, start: int, stop: int) -> Tensor:
        return new_float32(stored["data"][start:stop]).mul_(stored["scale"][start:stop].float())


def divisor(scale: Tensor) -> Tensor:
    """quanto divides a zero row by its scale, 0, and makes NaN of it; divided by 1 its codes are 0."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
