"""A book of 16 numbers for the weights of one tensor, and the signed E4M3 scales of its blocks.

ŵ = book[code] · scale. The book and the scales are found in turn: under given scales and codes the best book is a
weighted mean per code (Lloyd, Least squares quantization in PCM, 1982), with a given book the scales are searched.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from bitroute.backends._elements import E4M3
from bitroute.backends._table import Blocks, Table, reciprocals

STARTS = (  # where the rounds below end for Gaussian and for Laplace weights in blocks of 16
    (-1, -0.714, -0.565, -0.438, -0.325, -0.221, -0.121, -0.026, 0.064, 0.15, 0.237, 0.335, 0.443, 0.564, 0.704, 0.871),
    (-1, -0.655, -0.505, -0.375, -0.266, -0.17, -0.089, -0.017, 0.045, 0.113, 0.188, 0.275, 0.38, 0.505, 0.655, 0.86),
)
ROUNDS = 4
OVERSHOOT = 1.7  # times the way to the means: the scales that follow move the next means further the same way
LOUDEST = 8.0  # medians of the blocks' magnitudes; louder blocks count as such, or the book would be theirs alone
STEPS = (0, -1, 1, 2, 3, 4, 5, 6, 7)  # of the E4M3 scale from the block's largest magnitude
LOWER = (-2, -3, -4, -6, -8, -10, -12)  # where the largest elements may have next to no weight
REACH, BINS = 4, 1024  # weights up to 4 scales are told apart in so many bins to a scale
LARGEST_CODE = 126  # of the magnitudes of E4M3, 448; 127 is NaN


class Mirrored(Blocks):
    """Blocks [n, b, size] that are judged with a scale and with its negative at once."""

    def __init__(self, blocks: Tensor, book: Tensor, weights: Tensor | None) -> None:
        super().__init__(blocks, as_table(book), weights)
        self._squared = torch.empty_like(self.shares, dtype=torch.complex64)
        self._distances = _distances(self.table)

    def read(self, book: Tensor) -> None:
        """Go on with another book, float32 [16], ascending."""
        self.table = as_table(book)
        self._distances = _distances(self.table)

    def mirrored_errors(self, scales: Tensor) -> Tensor:
        """About `error` of positive scales [n, b], and as the imaginary part that of the same ones negative.

        A weight is judged by the middle of its bin. Complex numbers are looked up as fast as real ones.
        """
        share = self.shares_of_amax(scales)
        torch.mul(self.shares, reciprocals(share).mul_(BINS), out=self._values)
        self._bins.copy_(self._values.add_(REACH * BINS + 0.5).clamp_(0.5, 2 * REACH * BINS + 0.5))
        torch.index_select(self._distances, 0, self._bins.view(-1), out=self._squared.view(-1))
        squared = self._squared if self.weights is None else self._squared.mul_(self.weights)
        return squared.sum(-1) * share.squeeze(-1).square()


def search(blocks: Mirrored, unit: Tensor) -> Tensor:
    """Of each block [n, b] the scale that loses least, a signed E4M3 number times `unit`.

    The positive scale next to the block's largest magnitude is taken unless another is strictly better.
    """
    plain = E4M3.nearest(blocks.plain / unit) * unit
    codes = _codes(plain, unit)
    best, least = plain, torch.full_like(plain, torch.inf)
    for step in STEPS if blocks.weights is None else STEPS + LOWER:
        scale = E4M3.load((codes + step).clamp_(1, LARGEST_CODE).to(torch.uint8)) * unit
        errors = blocks.mirrored_errors(scale)
        for signed, error in ((scale, errors.real), (-scale, errors.imag)):
            best = torch.where(error < least, signed, best)
            least = torch.minimum(error, least)
    never_less = blocks.rough_error(best)  # than its exact error, and cheaper
    return torch.where(never_less < blocks.error(plain), best, plain)


def learn(sample: Tensor, unit: Tensor, weights: Tensor | None) -> Tensor:
    """The best book of a few rounds from the better start, float32 [16], ascending, its largest magnitude 1.

    sample: blocks [n, 1, size] in float32, weights: alike or None.
    """
    blocks = Mirrored(sample, torch.tensor(STARTS[0]), weights)
    tried = [_tried(blocks, torch.tensor(start), unit) for start in STARTS]
    best = current = min(tried, key=lambda found: found[0])
    for _ in range(ROUNDS):
        current = _tried(blocks, current[2], unit)
        best = min(best, current, key=lambda found: found[0])
    return best[1]


def as_table(book: Tensor) -> Table:
    """The same one for all blocks of a tensor."""
    return _as_table(tuple(book.tolist()), book.device)


@lru_cache(maxsize=64)
def _as_table(book: tuple[float, ...], device: torch.device) -> Table:
    return Table(torch.tensor(book, device=device), torch.arange(len(book), dtype=torch.uint8, device=device))


def _distances(table: Table) -> Tensor:
    """Squared, of the middle of each bin from the nearest number; imaginary: of its negative."""
    middles = torch.arange(-REACH * BINS, REACH * BINS + 1, device=table.numbers.device) / BINS
    squared = (table.numbers[torch.bucketize(middles, table.bounds)] - middles).square()
    return torch.complex(squared, squared.flip(0))


def _codes(scales: Tensor, unit: Tensor) -> Tensor:
    return (scales / unit).to(E4M3.dtype).view(torch.uint8).to(torch.int16)


def _tried(blocks: Mirrored, book: Tensor, unit: Tensor) -> tuple[float, Tensor, Tensor]:
    """The error with a book, the book, and the one to try next."""
    blocks.read(book)
    scales = search(blocks, unit)
    loudness = _loudness(blocks.plain)
    error = float((blocks.error(scales) * loudness.square()).double().sum())
    return error, book, _next(blocks, scales, loudness)


def _loudness(amax: Tensor) -> Tensor:
    audible = amax[amax > 0]
    return (amax / audible.median()).clamp_(max=LOUDEST) if len(audible) else amax


def _next(blocks: Mirrored, scales: Tensor, loudness: Tensor) -> Tensor:
    """The book beyond the weighted means of the weights per code; a code without any keeps its number."""
    book, values = blocks.table.numbers, blocks.in_scales(scales)
    importance = (scales / blocks.amax * loudness).square().unsqueeze(-1)
    importance = importance.expand_as(values) if blocks.weights is None else importance * blocks.weights
    places, importance = blocks.table.nearest(values).flatten(), importance.flatten().double()
    total = torch.bincount(places, importance, minlength=len(book))  # in order, so that threads change nothing
    means = torch.bincount(places, importance * values.flatten(), minlength=len(book)) / total
    moved = torch.where(total > 0, book + OVERSHOOT * (means.float() - book), book).sort().values
    return moved / moved.abs().amax()
