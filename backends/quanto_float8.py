"""FP8 E4M3, a bf16 scale per row, by optimum-quanto's qfloat8: s = amax / 448."""

from __future__ import annotations

from optimum.quanto import qfloat8
from pydantic.dataclasses import dataclass

from bitroute.backends._quanto import QuantoByte


@dataclass(frozen=True)
class QuantoFloat8(QuantoByte):
    name = "quanto-float8"
    weights_dtype = "float8"
    qtype = qfloat8
    lowest_sqnr_db = 20.0
