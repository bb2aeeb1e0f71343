"""The elements of block formats: rounding, packing, reading back, and choosing a scale by its error.

Sources: OCP Microscaling Formats (MX) v1.0, sections 5.3 and 6.3; the codes are those of torchao 0.18,
torchao/prototype/mx_formats (nearest, ties to even, saturating). Packing assumes a little-endian machine.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bitroute.backends._compiled import rounding_of
from bitroute.backends.base import BLOCK_ELEMENTS

_F32_MANTISSA_BITS = 23
_F32_BIAS = 127
_F16_MANTISSA_BITS = 10
_F16_BIAS = 15
_EXPONENT = 0x7F800000


@dataclass(frozen=True)
class Element:
    """A small sign-magnitude float without infinities."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    max: float
    dtype: torch.dtype  # of the stored tensor; uint8 where several elements share bytes

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return int(2 ** (self.exponent_bits - 1)) - 1

    @property
    def max_exponent(self) -> int:
        """floor(log2(max)): `emax` of the OCP specification."""
        return math.frexp(self.max)[1] - 1

    def columns(self, elements: int) -> int:
        """Stored columns of a row of so many elements."""
        return elements * self.bits // 8

    def nearest(self, values: Tensor, scratch: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """float32 → the nearest representable float32, ties to even, saturating; a zero loses its sign.

        A value's own power of two times 1.5 · 2^(23 - mantissa bits), added and removed, rounds its mantissa.
        scratch: the memory for it, float32 and int32 in the shape of `values`; the first is what is returned.
        """
        clamped, anchor = scratch or (None, None)
        values = torch.clamp(values, -self.max, self.max, out=clamped)
        anchor = torch.bitwise_and(values.view(torch.int32), _EXPONENT, out=anchor)
        anchor.clamp_(min=(_F32_BIAS + 1 - self.bias) << _F32_MANTISSA_BITS)  # subnormals share one step
        anchor.add_(((_F32_MANTISSA_BITS - self.mantissa_bits) << _F32_MANTISSA_BITS) + (1 << 22))
        return values.add_(anchor.view(torch.float32)).sub_(anchor.view(torch.float32))

    def store(self, values: Tensor) -> Tensor:
        """float32 [..., n], already divided by their scale → stored elements [..., columns(n)]."""
        compiled = rounding_of(values)
        if self.bits == 8 and not compiled:
            return values.clamp(-self.max, self.max).to(self.dtype)
        codes = compiled.codes(values, self.fields) if compiled else self._rounded_codes(values)
        return pack(codes, self.bits).view(self.dtype)

    def _rounded_codes(self, values: Tensor) -> Tensor:
        """float32 → codes, uint8."""
        rounded = self.nearest(values).copysign_(values).mul_(2.0 ** (self.bias - _F16_BIAS))
        half = rounded.half().view(torch.int16)  # exact, and its bits are the code with a wider mantissa
        codes = (half >> (_F16_MANTISSA_BITS - self.mantissa_bits)).bitwise_and_(self._magnitude)
        codes |= (half >> (16 - self.bits)).bitwise_and_(self._sign)
        return codes.to(torch.uint8)

    def load(self, stored: Tensor) -> Tensor:
        """Stored elements [..., columns(n)] → float32 [..., n], not yet multiplied by their scale."""
        compiling = torch.compiler.is_compiling()
        if compiling and stored.dtype.is_floating_point:
            return stored.float()
        if self.bits == 4:
            return _e2m1(self.codes(stored)) if compiling else looked_up(stored, _numbers(self, stored.device))
        return self.read(self.codes(stored))

    def read(self, codes: Tensor) -> Tensor:
        """uint8 codes → float32; a half has the same fields, only wider ones."""
        first = codes if self.bits == 8 else codes << (8 - self.bits)
        signed = first.view(torch.int8).to(torch.int16)  # the sign fills what lies above
        half = signed.bitwise_left_shift_(_F16_MANTISSA_BITS - self.mantissa_bits - 8 + self.bits)
        half.bitwise_and_((1 << (_F16_MANTISSA_BITS + self.exponent_bits)) - 1 - 0x8000)
        return half.view(torch.float16).float().mul_(2.0 ** (_F16_BIAS - self.bias))

    def codes(self, stored: Tensor) -> Tensor:
        """Stored elements [..., columns(n)] → their codes, uint8 [..., n]."""
        return unpack(stored, self.bits)

    @property
    def fields(self) -> tuple[int, int, float]:
        return self.exponent_bits, self.mantissa_bits, self.max

    @property
    def _magnitude(self) -> int:
        return self._sign - 1

    @property
    def _sign(self) -> int:
        return 1 << (self.bits - 1)


E2M1 = Element("e2m1", 2, 1, 6.0, torch.uint8)
E2M3 = Element("e2m3", 2, 3, 7.5, torch.uint8)
E3M2 = Element("e3m2", 3, 2, 28.0, torch.uint8)
E4M3 = Element("e4m3", 4, 3, 448.0, torch.float8_e4m3fn)
E5M2 = Element("e5m2", 5, 2, 57344.0, torch.float8_e5m2)


def in_blocks(rows: Tensor, size: int) -> Tensor:
    """[n, k] of any float dtype → float32 [n, k / size, size]."""
    return rows.float().reshape(rows.shape[0], rows.shape[1] // size, size)


def block_amax(blocks: Tensor) -> Tensor:
    """Floats of 16 or 32 bits [..., size] → largest magnitudes [...], in their dtype.

    As integers, which order alike and reduce faster; of 16 bits only where blocks are of 64 or more.
    """
    integers = torch.int32 if blocks.itemsize == 4 else torch.int16
    return (blocks.view(integers) & torch.iinfo(integers).max).amax(-1).view(blocks.dtype)


def largest(blocks: Iterable[Tensor]) -> Tensor:
    """The largest magnitude of all blocks of rows, in their dtype; nothing of a block stays behind."""
    return functools.reduce(torch.maximum, (block_amax(rows.flatten()) for rows in blocks))


def squared_error(blocks: Tensor, element: Element, weights: Tensor | None) -> Callable[[Tensor], Tensor]:
    """reciprocals [n, b] → Σ weight · (y - nearest(y))² per block [n, b], for y = block · reciprocal.

    blocks [n, b, size], weights [b, size] or None; the error is in units of the squared scale. All calls share
    their temporaries: fresh memory costs more than the arithmetic.
    """
    scaled, rounded, anchor = (
        torch.empty_like(blocks, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.int32)
    )

    def error(reciprocals: Tensor) -> Tensor:
        if compiled := rounding_of(blocks, reciprocals):
            squared = compiled.squares(blocks, reciprocals, rounded, element.fields)
        else:
            torch.mul(blocks, reciprocals.unsqueeze(-1), out=scaled)
            squared = scaled.sub_(element.nearest(scaled, (rounded, anchor))).square_()
        return (squared if weights is None else squared.mul_(weights)).sum(-1)

    return error


def block_weights(second_moment: Tensor | None, size: int, device: torch.device) -> Tensor | None:
    """E[x²] per input channel [in] as the weights of `squared_error` [in / size, size]."""
    return None if second_moment is None else second_moment.to(device, torch.float32).reshape(-1, size)


def least_error(first: Tensor, others: Iterable[Tensor], error: Callable[[Tensor], Tensor]) -> Tensor:
    """Per block the candidate with the least error; the first one unless another is strictly better."""
    best, best_error = first, error(first)
    for candidate in others:
        candidate_error = error(candidate)
        best = torch.where(candidate_error < best_error, candidate, best)
        best_error = torch.minimum(candidate_error, best_error)
    return best


def by_row_blocks(rows: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """`work` on cache-sized blocks of rows [n, k], joined."""
    return torch.cat([work(block) for block in torch.split(rows, max(1, BLOCK_ELEMENTS // rows.shape[1]))])


def new_float32(stored: Tensor) -> Tensor:
    """Numbers of an 8-bit dtype; torch converts E4M3 one by one on the CPU, which takes ten times as long."""
    if stored.dtype != E4M3.dtype or stored.device.type != "cpu" or torch.compiler.is_compiling():
        return stored.float()
    codes = stored.view(torch.uint8)
    has_nan = codes.amax() == 0xFF or codes.view(torch.int8).amax() == 0x7F
    return stored.float() if has_nan else E4M3.read(codes)


def _e2m1(codes: Tensor) -> Tensor:
    """uint8 codes → float32, in floats: of small integers inductor makes no vectors on a CPU."""
    code = codes.float()
    size = torch.where(code < 8, code, code - 8)
    value = torch.maximum(torch.maximum(size / 2, size - 2), 2 * size - 8)  # steps of 1/2, then of 1, then of 2
    return torch.where(code < 8, value, -value)


@cache
def _numbers(element: Element, device: torch.device) -> Tensor:
    """What each code stands for, float32 [2^bits]."""
    return element.read(torch.arange(1 << element.bits, dtype=torch.uint8, device=device))


def looked_up(packed: Tensor, numbers: Tensor, high_first: bool = False) -> Tensor:
    """Bytes [..., n / 2] of two codes, the first in the low nibble or in the high → numbers[code], float32 [..., n]."""
    if torch.compiler.is_compiling():
        low, high = (packed & 15).int(), (packed >> 4).int()
        return numbers[torch.stack([high, low] if high_first else [low, high], dim=-1)].flatten(-2)
    pairs = numbers.index_select(0, _places(high_first, numbers.device)).view(torch.int64)
    return pairs.index_select(0, packed.flatten().int()).view(torch.float32).view(*packed.shape[:-1], -1)


@cache
def _places(high_first: bool, device: torch.device) -> Tensor:
    """The two codes of each byte, int32 [512]."""
    codes = torch.arange(16, dtype=torch.int32, device=device)
    pairs = torch.cartesian_prod(codes, codes)
    return (pairs if high_first else pairs.flip(-1)).flatten()


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] of 4, 6 or 8 bits → uint8 [..., n · bits / 8]."""
    packers = {4: _pack_nibbles, 6: _pack_sixes}
    return packers[bits](codes) if bits in packers else codes


def unpack(stored: Tensor, bits: int) -> Tensor:
    """What `pack` made of codes → the codes, uint8 [..., n]."""
    unpackers = {4: _unpack_nibbles, 6: _unpack_sixes}
    return unpackers[bits](stored) if bits in unpackers else stored.view(torch.uint8)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes [..., n] → uint8 [..., n / 2], the even element in the low nibble."""
    pairs = codes.view(torch.int16)
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # views of another size are not fused
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    wide = packed.to(torch.int16)
    return (wide & 0x0F).bitwise_or_((wide & 0xF0) << 4).view(torch.uint8)


def _pack_sixes(codes: Tensor) -> Tensor:
    """uint8 codes [..., n] → uint8 [..., 3n / 4]: four make a 24-bit little-endian number, first lowest."""
    fours = codes.view(torch.int32)
    joined = (fours & 0x3F) | (fours >> 2 & 0xFC0) | (fours >> 4 & 0x3F000) | (fours >> 6 & 0xFC0000)
    return joined.view(torch.uint8).reshape(*joined.shape, 4)[..., :3].flatten(-2)


def _unpack_sixes(packed: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        one, two, three = packed.reshape(*packed.shape[:-1], -1, 3).unbind(-1)
        codes = one & 0x3F, (one >> 6 | two << 2) & 0x3F, (two >> 4 | three << 4) & 0x3F, three >> 2
        return torch.stack(codes, dim=-1).flatten(-2)
    aligned = packed.clone()  # in a file it may start anywhere
    first, second, third = aligned.view(torch.int32).reshape(*packed.shape[:-1], -1, 3).unbind(-1)
    middle = (first >> 24 & 0xFF) | second << 8, (second >> 16 & 0xFFFF) | third << 16
    joined = torch.stack([first, *middle, third >> 8], dim=-1).flatten(-2)  # 24 bits, and others above that are ignored
    twos = (joined & 0xFFF000).bitwise_left_shift_(4).bitwise_or_(joined.bitwise_and_(0xFFF))
    fours = (twos & 0x0FC00FC0).bitwise_left_shift_(2).bitwise_or_(twos.bitwise_and_(0x003F003F))
    return fours.view(torch.uint8)
