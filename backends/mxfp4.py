"""MXFP4: E2M1 elements (0, 0.5, 1, 1.5, 2, 3, 4, 6, signed) with a power-of-two scale per 32, 4.25 bits.

Stored: two elements per byte, the even one in the low nibble, and the scales as E8M0; torchao's own layout.
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from bitroute.backends._elements import E2M1, Element
from bitroute.backends._mx import MX


@dataclass(frozen=True)
class MXFP4(MX):
    name = "mxfp4"
    needs = frozenset({"torchao"})
    lowest_sqnr_db = 8.0

    @property
    def weight_element(self) -> Element:
        return E2M1
