"""INT8, symmetric, a bf16 scale per row, by optimum-quanto's qint8: s = amax / 127."""

from __future__ import annotations

from optimum.quanto import qint8
from pydantic.dataclasses import dataclass

from bitroute.backends._quanto import QuantoByte


@dataclass(frozen=True)
class QuantoInt8(QuantoByte):
    name = "quanto-int8"
    weights_dtype = "int8"
    qtype = qint8
    lowest_sqnr_db = 15.0
