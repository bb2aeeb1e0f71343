"""INT6: weights of 6-bit integers in groups of 64 along a row; 6.25 bits, 6.5 with zeros.

Options as of int4; 2.4 % error of Gaussian weights, 2.3 with `scale: mse`, and 2.0 with zeros too. Stored: four codes
in three bytes as one little-endian 24-bit number, the first lowest.
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from bitroute.backends._integers import Integers


@dataclass(frozen=True)
class Int6(Integers):
    name = "int6"
    bits = 6
    lowest_sqnr_db = 14.0
