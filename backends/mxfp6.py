"""MXFP6: E2M3 (to 7.5) or E3M2 (to 28) elements with a power-of-two scale per 32, 6.25 bits.

E2M3 has half the error of E3M2 on weights. Stored: four elements in three bytes as one little-endian 24-bit
number, the first element lowest, and the scales as E8M0. torchao keeps a byte per element, and only
bitroute reads this.
"""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from bitroute.backends._elements import E2M3, E3M2, Element
from bitroute.backends._mx import MX


@dataclass(frozen=True)
class MXFP6(MX):
    name = "mxfp6"
    lowest_sqnr_db = 15.0

    activations: Literal["none", "mxfp8"] = "none"
    element: Literal["e2m3", "e3m2"] = "e2m3"

    @property
    def weight_element(self) -> Element:
        return {"e2m3": E2M3, "e3m2": E3M2}[self.element]
