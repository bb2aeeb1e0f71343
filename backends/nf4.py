"""NF4: 4-bit codes of a table of 16 quantiles of the normal distribution, by bitsandbytes.

A block of weights along a row shares a scale: its largest magnitude (absmax), or whatever number loses least
(mse), judged as it is read back after double quantization; absmax unless another is strictly better. Both are
stored alike. Gaussian weights err by 9.20 % with absmax and 8.49 % with mse, with mse in blocks of 32 by 7.84 %
at 4.25 bits.
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from bitroute.backends._bitsandbytes import FourBit


@dataclass(frozen=True)
class Nf4(FourBit):
    name = "nf4"
    quant_type = "nf4"
    lowest_sqnr_db = 10.0
