"""No quantization: the weight as it is, or cast to another float dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from bitroute.backends.base import NONE, Backend, Statistics, Survey, TensorSpec

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Keep(Backend):
    name = "keep"
    family = "any"
    lowest_sqnr_db = 40.0

    dtype: Literal["source", "bfloat16", "float16", "float32"] = "source"

    def outputs(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec(weight.shape, DTYPES.get(self.dtype, weight.dtype))}

    def encode(self, rows: Tensor, survey: Survey, statistics: Statistics = NONE) -> dict[str, Tensor]:
        return {"weight": rows.to(DTYPES.get(self.dtype, rows.dtype))}

    def decode(self, stored: Mapping[str, Tensor], weight: TensorSpec) -> Tensor:
        return stored["weight"].float()
