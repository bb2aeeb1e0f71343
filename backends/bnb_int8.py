"""LLM.int8() weights: INT8 with the absolute maximum of each row, by bitsandbytes.

SCB = amax of the row, q = round(w · 127 / SCB), ŵ = q · SCB / 127, from w rounded to fp16. A row whose amax is
outside the normal range of fp16 (6.1e-5 to 65504) is scaled by a power of two on the way, where bitsandbytes loses
digits or stores inf. In the native container the activations are quantized too, save columns above
llm_int8_threshold; in bitroute's only the weight is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from bitsandbytes.functional import int8_vectorwise_quant
from pydantic.dataclasses import dataclass
from torch import Tensor

from bitroute.backends.base import NONE, Backend, NativeRecord, Statistics, Survey, TensorSpec

FP16_EXPONENT = 15  # a row scaled below 2¹⁵ is finite in fp16
FP16_SMALLEST = torch.finfo(torch.float16).smallest_normal  # below it fp16 has ever fewer digits
FLOAT32_MAX = torch.finfo(torch.float32).max
LARGEST_EXPONENT = 126  # of a power of two by which a row is multiplied
HEADROOM = 128.0  # codes · SCB, which comes before the division by 127, must not overflow


@dataclass(frozen=True)
class BnbInt8(Backend):
    name = "bnb-int8"
    family = "bitsandbytes_8bit"
    needs = frozenset({"bitsandbytes"})
    lowest_sqnr_db = 15.0

    def outputs(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        return {
            "codes": TensorSpec(weight.shape, torch.int8),
            "SCB": TensorSpec(weight.shape[:1], torch.float32),
            "weight_format": TensorSpec((), torch.uint8),
        }

    def survey(self, blocks: Iterable[Tensor], weight: TensorSpec, statistics: Statistics = NONE) -> Survey:
        return Survey(outputs={"weight_format": torch.tensor(0, dtype=torch.uint8)})  # 0: plain rows

    def encode(self, rows: Tensor, survey: Survey, statistics: Statistics = NONE) -> dict[str, Tensor]:
        power = _power(rows)
        codes, amax, _ = int8_vectorwise_quant((rows.float() * power).half())
        scale = (amax / power[:, 0]).clamp_(max=FLOAT32_MAX)  # fp16 may have rounded amax up, beyond float32
        # a zero row is divided by its amax, and what an integer makes of NaN depends on the processor
        return {"codes": codes.masked_fill(amax[:, None] == 0, 0), "SCB": scale}

    def decode_rows(self, stored: Mapping[str, Tensor], weight: TensorSpec, start: int, stop: int) -> Tensor:
        """int8_vectorwise_dequant bit for bit, where that is finite: a power of two changes no digit."""
        scale = (stored["SCB"][start:stop] / HEADROOM).unsqueeze(1)
        return stored["codes"][start:stop].float().mul_(scale).mul_(HEADROOM / 127)

    def record(self, weight: TensorSpec) -> NativeRecord:
        names = {"codes": "weight", "SCB": "SCB", "weight_format": "weight_format"}
        config = {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": 6.0,
        }
        return NativeRecord(names=names, config=config)


def _power(rows: Tensor) -> Tensor:
    """1 for each row that fp16 holds well, else the power of two that brings it in range; float32 [rows, 1]."""
    amax = rows.abs().amax(dim=1, keepdim=True)
    _, exponent = torch.frexp(amax.float())
    powers = torch.exp2((FP16_EXPONENT - exponent).clamp(max=LARGEST_EXPONENT).float())
    return torch.where(amax.half().isinf() | (amax < FP16_SMALLEST), powers, 1.0)
