"""4-bit codes of a table of 16 numbers in [-1, 1], and the block scales that lose least with them.

ŵ = table[code] · scale. The search tries the largest magnitude times 0.4 to 1.6, first in steps of 0.04, then of
0.01 around the best. Of Gaussian NF4 weights the best of all factors in steps of 0.01 leaves an error of 8.484 %,
and this one of 8.49 %, in three to five times the time of quantizing without a search.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Literal

import numpy
import torch
from bitsandbytes.functional import get_4bit_type
from torch import Tensor

from bitroute.backends._compiled import BOUNDS, LARGEST_BLOCK, rounding_of
from bitroute.backends._elements import block_amax, least_error

COARSE = tuple(0.4 + 0.04 * step for step in range(31))  # below 0.75 seldom, where errors are not weighted
FINE = (0.98, 0.99, 1.01, 1.02)
SMALLEST_AMAX = 1e-38  # of a block, as in bitsandbytes; its reciprocal must be finite
SMALLEST_SHARE, LARGEST_SHARE = 1e-6, 1e6  # of a scale in its block's amax; beyond, the error no longer depends on it
UNSURE = 255  # of a place
BINS = 2048  # of [0, 1], for values that need not be rounded exactly


class Table:
    """The numbers in ascending order with their codes, and the nearest of them by a look into narrow bins."""

    def __init__(self, numbers: Tensor, codes: Tensor) -> None:
        """numbers: float32 [16] in [-1, 1], ascending; codes: uint8 [16], what is stored for them."""
        self.numbers, self.codes, device = numbers, codes, numbers.device
        self.in_order = bool(torch.equal(codes, torch.arange(len(codes), dtype=torch.uint8, device=device)))
        self.bounds = (numbers[1:] + numbers[:-1]) / 2
        edges = torch.arange(-BINS, BINS + 1, device=device) / BINS
        self.rough = self.numbers[torch.bucketize(edges, self.bounds)]

    @cached_property
    def by_head(self) -> Tensor:
        """Of the first 16 bits of a float32 the place, or UNSURE where the other 16 decide; uint8 [65536]."""
        heads = torch.arange(1 << 16, dtype=torch.int32) << 16
        first, last = (torch.bucketize(bits.view(torch.float32), self.bounds.cpu()) for bits in (heads, heads | 0xFFFF))
        return torch.where(first == last, first, UNSURE).to(torch.uint8)

    def nearest(self, values: Tensor) -> Tensor:
        """float32 [...] → places of the nearest numbers, uint8 [...]; exact, a tie goes to the lower one.

        Eagerly on a CPU the few that the first 16 bits leave unsure are looked for one by one, 25 times as slow.
        """
        compiled = rounding_of(values)
        if compiled and len(self.bounds) == BOUNDS:
            return compiled.places(values, self.bounds)
        if values.device.type != "cpu":
            return torch.bucketize(values, self.bounds).to(torch.uint8)
        heads = (values.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
        places = _looked_up(self.by_head, heads)
        unsure = torch.from_numpy(numpy.flatnonzero(places.numpy() == UNSURE))  # torch's nonzero takes longer than all
        exact = torch.bucketize(values.flatten()[unsure], self.bounds).to(torch.uint8)
        places.view(-1).index_copy_(0, unsure, exact)
        return places

    def roughly_nearest(self, values: Tensor, scratch: Tensor) -> Tensor:
        """The numbers, in the place of `values`; what is within 1/4096 of a bound may go to its other side.

        scratch: int32 in the shape of `values`, which are contiguous.
        """
        scratch.copy_(values.mul_(BINS).clamp_(-BINS, BINS).add_(BINS + 0.5))
        torch.index_select(self.rough, 0, scratch.view(-1), out=values.view(-1))
        return values

    def pack(self, values: Tensor) -> Tensor:
        """[...] in row-major order → the codes of the nearest, two to a byte, the first in the high half, [·, 1]."""
        codes = self.nearest(values.flatten())
        if not self.in_order:
            codes = _looked_up(self.codes, codes)
        pairs = codes.view(torch.int16)  # the first of two in the low half
        return (pairs << 4).bitwise_or_(pairs >> 8).to(torch.uint8).unsqueeze(1)


def read_back(numbers: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
    """The nearest number · scale for float32 weights [...] and scales that broadcast to them; few at a time.

    numbers: ascending. A scale of zero gives zeros; a tie goes to the lower number, as `Table.nearest` has it.
    """
    units = (1.0 / scales).nan_to_num_(posinf=0.0, neginf=0.0)
    places = torch.bucketize(weights * units, (numbers[1:] + numbers[:-1]) / 2)
    return numbers[places] * scales


@cache
def table(quant_type: Literal["nf4", "fp4"], device: torch.device) -> Table:
    numbers, order = get_4bit_type(quant_type, device=device).sort()
    return Table(numbers, order.to(torch.uint8))


class Blocks:
    """Blocks [n, b, size], float32, in shares of their amax, which neither overflow nor underflow when squared."""

    def __init__(self, blocks: Tensor, found: Table, weights: Tensor | None) -> None:
        self.plain = block_amax(blocks)
        self.amax = self.plain.clamp(min=SMALLEST_AMAX)
        self.shares = blocks * (1.0 / self.amax).unsqueeze(-1)
        self.table, self.weights = found, weights  # weights [b, size], or None
        self._values, self._bins = torch.empty_like(self.shares), torch.empty_like(self.shares, dtype=torch.int32)

    def search(self, plain: Tensor, stored: Callable[[Tensor], Tensor]) -> Tensor:
        """Per block the scale with the least error, [n, b]; `plain` unless another is strictly better.

        stored: scales → what will be read back for them.
        """
        found = stored(least_error(plain, (self.amax * factor for factor in COARSE), self.rough_error))
        found = least_error(found, (stored(found * factor) for factor in FINE), self.rough_error)
        return least_error(plain, [found], self.error)

    def in_scales(self, scales: Tensor) -> Tensor:
        """The weights [n, b, size] as multiples of their block's scale."""
        return self.shares * reciprocals(self.shares_of_amax(scales))

    def codes(self, scales: Tensor) -> Tensor:
        return self.table.pack(self.in_scales(scales))

    def error(self, scales: Tensor) -> Tensor:
        """Σ weight · (w - ŵ)² per block, in units of its squared amax, [n, b]."""
        share = self.shares_of_amax(scales)
        places = self.table.nearest(self.in_scales(scales))
        return self._squared_error(_looked_up(self.table.numbers, places), share)

    def rough_error(self, scales: Tensor) -> Tensor:
        share = self.shares_of_amax(scales)
        units = reciprocals(share)
        compiled = rounding_of(self.shares, units, share)
        if compiled and self.shares.shape[-1] <= LARGEST_BLOCK:
            return self._summed(compiled.table_squares(self.shares, units, share, self.table.rough, BINS, self._values))
        torch.mul(self.shares, units, out=self._values)
        return self._squared_error(self.table.roughly_nearest(self._values, self._bins), share)

    def shares_of_amax(self, scales: Tensor) -> Tensor:
        return (scales / self.amax).clamp_(-LARGEST_SHARE, LARGEST_SHARE).unsqueeze(-1)

    def _squared_error(self, decoded: Tensor, share: Tensor) -> Tensor:
        return self._summed(decoded.mul_(share).sub_(self.shares).square_())

    def _summed(self, squared: Tensor) -> Tensor:
        return (squared if self.weights is None else squared.mul_(self.weights)).sum(-1)


def _looked_up(values: Tensor, places: Tensor) -> Tensor:
    """values[places], several times as fast."""
    return values.index_select(0, places.flatten().int()).view_as(places)


def reciprocals(shares: Tensor) -> Tensor:
    """A scale of zero decodes to zero whatever the codes."""
    return 1.0 / shares.abs().clamp_(min=SMALLEST_SHARE).copysign_(shares)
