"""NF4: 4-bit codes of a table of 16 quantiles of the normal distribution, by bitsandbytes."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from bitroute.backends._bitsandbytes import FourBit


@dataclass(frozen=True)
class Nf4(FourBit):
    name = "nf4"
    quant_type = "nf4"
    lowest_sqnr_db = 10.0
