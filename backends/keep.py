"""No quantization: the weight as it is, or cast to another float dtype, which integers and booleans never are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from bitroute.backends.base import NONE, Backend, Statistics, Survey, TensorSpec, cast

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

LARGER = "keep this layer in a dtype that holds it: bfloat16, float32 or source"


@dataclass(frozen=True)
class Keep(Backend):
    name = "keep"
    family = "any"
    lowest_sqnr_db = 40.0

    dtype: Literal["source", "bfloat16", "float16", "float32"] = "source"

    def refuse(self, weight: TensorSpec) -> str | None:
        return None

    def refuse_convolution(self) -> str | None:
        return None

    def outputs(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec(weight.shape, self._stored(weight.dtype))}

    def arithmetic(self, rows: Tensor) -> Tensor:
        """Any dtype is kept."""
        return rows

    def encode(self, rows: Tensor, survey: Survey, statistics: Statistics = NONE) -> dict[str, Tensor]:
        """Raises BackendError where a finite value does not fit the wished dtype."""
        return {"weight": cast(rows, self._stored(rows.dtype), next_step=LARGER)}

    def decode_rows(self, stored: Mapping[str, Tensor], weight: TensorSpec, start: int, stop: int) -> Tensor:
        return stored["weight"][start:stop].float()

    def _stored(self, dtype: torch.dtype) -> torch.dtype:
        return DTYPES.get(self.dtype, dtype) if dtype.is_floating_point else dtype
