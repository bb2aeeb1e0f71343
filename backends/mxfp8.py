"""MXFP8: E4M3 (to 448) or E5M2 (to 57344) elements with a power-of-two scale per 32, 8.25 bits.

Stored in torchao's own layout. Quantized activations are E4M3 whatever the weight's element is.
"""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from bitroute.backends._elements import E4M3, E5M2, Element
from bitroute.backends._mx import MX


@dataclass(frozen=True)
class MXFP8(MX):
    name = "mxfp8"
    needs = frozenset({"torchao"})
    lowest_sqnr_db = 15.0

    activations: Literal["none", "mxfp8"] = "none"
    element: Literal["e4m3", "e5m2"] = "e4m3"

    @property
    def weight_element(self) -> Element:
        return {"e4m3": E4M3, "e5m2": E5M2}[self.element]
