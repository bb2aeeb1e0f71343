"""Grouped integers: what int4, int6 and int8-group share.

ŵ = (code - 2^(bits-1)) · scale + zero: groups of 32, 64 or 128 weights along a row have a scale and, where they are
not symmetric, a zero of their own (the weight that the middle code stands for), both bfloat16. The zero:

    none    the scale is amax / (2^(bits-1) - 1), and the middle code is 0
    minmax  the codes reach from the least weight of the group to the largest
    hqq     the same scale, and the best zero of 20 proximal steps of half-quadratic splitting with p = 0.7, beta = 10
            and kappa = 1.01 (HQQ, hqq/core/optimize.py, but with errors in units of the scale, so that the size of the
            weights plays no part); that of minmax unless another is strictly better

The scale is as above (absmax) or what a search finds to lose least (mse), weighted by the mean square of each input
where calibration measured it: from shares of the scale, least squares fit scale and zero to the codes; absmax unless
another is strictly better. A scale may be negative: the code that has no counterpart then serves positive weights.

Everything is judged as it is read back. bfloat16 has the exponents of float32, so the precision of a group does not
depend on its size, and codes are chosen for the rounded scale and zero, whose rounding therefore costs nothing:
where it moves a zero, the scale grows as much. Below 1e-36 scales are subnormal numbers, and lose digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from bitroute.backends._elements import block_amax, block_weights, in_blocks, pack, unpack
from bitroute.backends._rounded import Rounded, Scales
from bitroute.backends.base import NONE, Statistics, Survey, TensorSpec

STORED = torch.bfloat16
LARGEST = torch.finfo(torch.float32).max
STARTS = (1.0, 0.985, 0.97, 0.94, 0.91, 0.88, 0.84, 0.8, 0.75, 0.68, 0.55, 0.35)  # the low ones where weighted
SHIFT = 0.25  # of a scale, by which the zeros start higher and lower
P, BETA, KAPPA, STEPS = 0.7, 10.0, 1.01, 20

Pair = tuple[Tensor, Tensor]  # scale and zero of each group, [n, b]


@dataclass(frozen=True)
class Integers(Rounded):
    family = "bitroute"
    bits: ClassVar[int]

    group: Literal[32, 64, 128] = 64
    zero: Literal["none", "minmax", "hqq"] = "none"
    scale: Literal["absmax", "mse"] = "absmax"

    def refuse(self, weight: TensorSpec) -> str | None:
        columns = weight.shape[1]
        if columns % self.group:
            return f"{columns} input features are not a multiple of {self.group}"
        return super().refuse(weight)

    def refuse_convolution(self) -> str | None:
        return None

    def outputs(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape
        scale = TensorSpec((rows, columns // self.group), STORED)
        specs = {"codes": TensorSpec((rows, columns * self.bits // 8), torch.uint8), "scale": scale}
        return specs if self.zero == "none" else {**specs, "zero": scale}

    def scales(self, rows: Tensor, survey: Survey, statistics: Statistics = NONE) -> Scales:
        weights = block_weights(statistics.second_moment, self.group, rows.device)
        groups = Groups(in_blocks(rows, self.group), self.bits, self.zero != "none", weights)
        found = groups.plain()
        if self.zero == "hqq":
            found = groups.half_quadratic(found)
        if self.scale == "mse":
            found = groups.search(found)
        scale, zero = (values * groups.unit for values in found)
        return (scale,) if self.zero == "none" else (scale, zero)

    def nearest(self, weights: Tensor, scales: Scales, survey: Survey) -> Tensor:
        return _read(_codes(weights, scales, self.bits), scales)

    def store(self, rows: Tensor, scales: Scales, survey: Survey) -> dict[str, Tensor]:
        each = tuple(values.unsqueeze(-1) for values in scales)
        codes = (
            _codes(in_blocks(rows, self.group), each, self.bits).add_(_half(self.bits)).to(torch.int16).to(torch.uint8)
        )
        stored = {"codes": pack(codes.flatten(1), self.bits)}
        return stored | {name: values.to(STORED) for name, values in zip(("scale", "zero"), scales, strict=False)}

    def decode_rows(self, stored: Mapping[str, Tensor], weight: TensorSpec, start: int, stop: int) -> Tensor:
        names = ("scale",) if self.zero == "none" else ("scale", "zero")
        codes = in_blocks(unpack(stored["codes"][start:stop], self.bits), self.group).sub_(_half(self.bits))
        return _read(codes, tuple(stored[name][start:stop].float().unsqueeze(-1) for name in names)).flatten(1)


class Groups:
    """Groups [n, b, size] in units [n, b] of the power of two of their amax: nothing overflows, nothing underflows.

    Scales and zeros are in the same units, but rounded as they will be stored. Calls share their temporaries.
    """

    def __init__(self, groups: Tensor, bits: int, affine: bool, weights: Tensor | None) -> None:
        self.unit = _power_of_two(block_amax(groups))
        self.values = groups / self.unit.unsqueeze(-1)
        self.bits, self.affine, self.weights = bits, affine, weights  # weights [b, size]
        self._codes, self._product = torch.empty_like(self.values), torch.empty_like(self.values)
        self._count, self._total = self._sum(torch.ones_like(self.values)), self._sum(self.values)

    def plain(self) -> Pair:
        """The range of the group; where rounding moves the zero, the scale makes up for it."""
        highest = _half(self.bits) - 1
        top, bottom = self.values.amax(-1), self.values.amin(-1)
        if not self.affine:
            return self._stored(torch.maximum(top, -bottom) / highest, torch.zeros_like(top))
        middle = (top * _half(self.bits) + bottom * highest) / (highest + _half(self.bits))
        zero = self._stored(middle, middle)[1]
        return self._stored(torch.maximum((top - zero) / highest, (zero - bottom) / _half(self.bits)), zero)

    def search(self, plain: Pair) -> Pair:
        """The pair with the least error of each group; the plain one unless another is strictly better."""
        return self._least_error(plain, self._candidates(plain))

    def half_quadratic(self, plain: Pair) -> Pair:
        """HQQ's zeros; of each group the best of all steps."""
        return self._least_error(plain, self._proximal_steps(plain))

    def error(self, pair: Pair) -> Tensor:
        """Σ weight · (w - ŵ)² of each group, [n, b]."""
        left = self._left(pair).square_()
        return (left if self.weights is None else left.mul_(self.weights)).sum(-1)

    def _candidates(self, plain: Pair) -> Iterator[Pair]:
        """Of each start two: with both signs of the scale, or with the zero a little lower and higher."""
        scale, zero = plain
        for share in STARTS:
            for sign in (-1, 1):
                start = (scale * share, zero + sign * SHIFT * scale) if self.affine else (scale * share * sign, zero)
                yield self._stored(*self._fitted(start))

    def _least_error(self, first: Pair, others: Iterator[Pair]) -> Pair:
        """What is not finite has no error that is less than another."""
        best, least = first, self.error(first)
        for pair in others:
            error = self.error(pair)
            better = error < least
            best = (torch.where(better, pair[0], best[0]), torch.where(better, pair[1], best[1]))
            least = torch.where(better, error, least)
        return best

    def _fitted(self, pair: Pair) -> Pair:
        """The scale and zero that are best for the codes of a pair: least squares, weighted."""
        codes = self._to_codes(pair)
        of_codes, of_both = self._sum(codes), self._sum(torch.mul(codes, self.values, out=self._product))
        of_squares = self._sum(torch.square(codes, out=self._product))
        if not self.affine:
            return of_both / of_squares, pair[1]
        scale = (of_both - of_codes * self._total / self._count) / (of_squares - of_codes.square() / self._count)
        return scale, (self._total - scale * of_codes) / self._count

    def _proximal_steps(self, pair: Pair) -> Iterator[Pair]:
        for step in range(STEPS):
            pair = self._stored(pair[0], self._proximal_zero(pair, BETA * KAPPA**step))
            yield pair

    def _proximal_zero(self, pair: Pair, beta: float) -> Tensor:
        """The mean of what codes leave of the weights once HQQ's shrunk error is taken out of them."""
        steps = pair[0].unsqueeze(-1)
        left = self._left(pair).div_(steps)
        shrunk = left.abs().sub_(left.abs().pow_(P - 1).div_(beta)).clamp_(min=0).copysign_(left).mul_(steps)
        return self._sum(self.values - shrunk - self._codes * steps) / self._count

    def _left(self, pair: Pair) -> Tensor:
        """w - ŵ, in memory that the next call overwrites."""
        left = torch.mul(self._to_codes(pair), pair[0].unsqueeze(-1), out=self._product).sub_(self.values).neg_()
        return left.sub_(pair[1].unsqueeze(-1)) if self.affine else left

    def _to_codes(self, pair: Pair) -> Tensor:
        reciprocals = torch.where(pair[0] == 0, 0, pair[0].reciprocal()).unsqueeze(-1)
        if self.affine:
            torch.sub(self.values, pair[1].unsqueeze(-1), out=self._codes).mul_(reciprocals)
        else:
            torch.mul(self.values, reciprocals, out=self._codes)
        return self._codes.round_().clamp_(-_half(self.bits), _half(self.bits) - 1)

    def _stored(self, scale: Tensor, zero: Tensor) -> Pair:
        return _stored(scale, self.unit), _stored(zero, self.unit)

    def _sum(self, values: Tensor) -> Tensor:
        return (values if self.weights is None else values * self.weights).sum(-1)


def _half(bits: int) -> int:
    return 1 << (bits - 1)


def _codes(weights: Tensor, scales: Scales, bits: int) -> Tensor:
    """float32 → the nearest codes, signed, as float32; ties to even."""
    scale, zero = scales[0], scales[1:]
    centered = weights - zero[0] if zero else weights
    return (centered / scale.masked_fill(scale == 0, torch.inf)).round_().clamp_(-_half(bits), _half(bits) - 1)


def _read(codes: Tensor, scales: Scales) -> Tensor:
    """Signed codes, which are overwritten, → weights; what rounds beyond float32 is its largest number."""
    decoded = codes.mul_(scales[0])
    return (decoded.add_(scales[1]) if scales[1:] else decoded).clamp_(-LARGEST, LARGEST)


def _power_of_two(amax: Tensor) -> Tensor:
    """The largest power of two that is no larger, but a normal number."""
    return (amax.view(torch.int32) & 0x7F800000).clamp_(min=1 << 23).view(torch.float32)


def _stored(values: Tensor, unit: Tensor) -> Tensor:
    largest = torch.finfo(STORED).max
    return (values * unit).clamp(-largest, largest).to(STORED).float() / unit
