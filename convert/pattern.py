"""Patterns over the dotted names of layers, and what they match; no pattern can take long.

Patterns match whole names, never parts of them.
"""

from __future__ import annotations

import fnmatch
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

from bitroute.convert.document import shown
from bitroute.errors import Problem, RecipeError

__all__ = ["RANGE", "BlockRange", "Layers", "Pattern"]

MAX_LENGTH = 300
MAX_RANGES = 4
MAX_NUMBERS = 16  # numbers of a name that a range can stand for: at most 1820 placements of MAX_RANGES
MAX_WAYS = 1 << 14  # of one regular expression to match a name: at most 2 ms for a name of 60 characters
OPEN_WAYS = 16  # what `*`, `+` and `{2,}` count for: three of them and a choice of four are MAX_WAYS
GLOB_COST, RANGE_COST = 4, 256  # in the time of one way, 0.12 µs for a name of 60 characters
RANGE = re.compile(r"\{(-?\d{1,6})(?:-(-?\d{1,6}))?\}", re.ASCII)
_SINGLE = re.compile(r"\{-?\d{1,6}(?:--?\d{1,6})?\}", re.ASCII)
_NUMBER = re.compile(r"(?<!\d)\d{1,9}(?!\d)", re.ASCII)
_WIDE_CLASS = re.compile(r"\[[^\]]*\d-\d\d", re.ASCII)
_SYNTAX = "`*`, `?`, `[...]`, block ranges such as {0-3}, {5} or {-2--1}, or `re:` and a regular expression"
_RULE = (
    "at most three open repeats (`*`, `+`, `{n,}`), few optional parts, no repeat or choice in a repeated group, "
    "no lookaround, backreference, condition, atomic group or possessive repeat"
)


@dataclass(frozen=True)
class BlockRange:
    """Blocks first to last, both included; negative numbers count from the end."""

    first: int
    last: int

    def within(self, count: int) -> range:
        """The same blocks counted from 0, among `count` blocks."""
        return range(self._from_start(self.first, count), self._from_start(self.last, count) + 1)

    def fits(self, count: int) -> bool:
        blocks = self.within(count)
        return len(blocks) > 0 and blocks[0] >= 0 and blocks[-1] < count

    def __str__(self) -> str:
        return f"{{{self.first}}}" if self.first == self.last else f"{{{self.first}-{self.last}}}"

    @staticmethod
    def _from_start(index: int, count: int) -> int:
        return index if index >= 0 else count + index


@dataclass(frozen=True)
class Pattern:
    """Pieces of a name with a block range between each two of them; a plain name has no pieces.

    cost: a bound on the time that matching takes; a plain name costs nothing.
    """

    text: str
    pieces: tuple[re.Pattern[str], ...] = ()
    ranges: tuple[BlockRange, ...] = ()
    cost: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Raises RecipeError without a place: the caller knows where the pattern stands."""
        if len(text) > MAX_LENGTH:
            expected = f"at most {MAX_LENGTH} characters"
            raise RecipeError(Problem("a pattern is too long", got=f"{len(text)} characters", expected=expected))
        if text.startswith("re:"):
            return _regex(text)
        if not re.search(r"[*?\[{}]", text):
            return cls(text)
        ranges = tuple(_block_range(text, found) for found in RANGE.finditer(text))
        pieces = tuple(re.compile(fnmatch.translate(piece)) for piece in _glob_pieces(text, len(ranges)))
        return cls(text, pieces, ranges, RANGE_COST if ranges else GLOB_COST)

    def placements(self, name: str) -> Iterator[tuple[re.Match[str], ...]]:
        """Every way to match the whole name with some number at each range."""
        found = islice(_NUMBER.finditer(name), MAX_NUMBERS if self.ranges else 0)
        for numbers in combinations(found, len(self.ranges)):
            starts = [0, *(number.end() for number in numbers)]
            ends = [*(number.start() for number in numbers), len(name)]
            if all(map(_spans, self.pieces, [name] * len(starts), starts, ends)):
                yield numbers


def _spans(piece: re.Pattern[str], name: str, start: int, end: int) -> bool:
    return piece.fullmatch(name, start, end) is not None


class Layers:
    """The layer names of a component, and how many blocks stand behind each prefix."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.known = frozenset(names)
        self.block_counts: dict[str, int] = {}
        for name in self.names:
            for number in _NUMBER.finditer(name):
                prefix, count = name[: number.start()], int(number.group()) + 1
                self.block_counts[prefix] = max(self.block_counts.get(prefix, 0), count)

    def matching(self, pattern: Pattern) -> list[str]:
        if not pattern.pieces:
            return [pattern.text] if pattern.text in self.known else []
        if not pattern.ranges:
            return [name for name in self.names if pattern.pieces[0].fullmatch(name)]
        return [name for name in self.names if any(self._in_ranges(pattern, at) for at in pattern.placements(name))]

    def outside(self, pattern: Pattern) -> str:
        """Which range reaches past every stack of blocks it could mean, in words; empty if none does."""
        reached = [at for name in self.names for at in pattern.placements(name)] if pattern.ranges else []
        for index, blocks in enumerate(pattern.ranges):
            prefixes = {at[index].string[: at[index].start()] for at in reached}
            if prefixes and not any(blocks.fits(self.block_counts[prefix]) for prefix in prefixes):
                stacks = sorted((self.block_counts[prefix], prefix) for prefix in prefixes)[::-1][:4]
                there = ", ".join(f"0-{count - 1} in {prefix.rstrip('.')}" for count, prefix in stacks)
                return f"{blocks}: the model's blocks there are {there}"
        return ""

    def _in_ranges(self, pattern: Pattern, numbers: tuple[re.Match[str], ...]) -> bool:
        counts = [self.block_counts[number.string[: number.start()]] for number in numbers]
        within = [blocks.within(count) for blocks, count in zip(pattern.ranges, counts, strict=True)]
        return all(int(number.group()) in blocks for number, blocks in zip(numbers, within, strict=True))


def _block_range(text: str, found: re.Match[str]) -> BlockRange:
    first, last = int(found[1]), int(found[2] or found[1])
    if first > last and (first < 0) == (last < 0):
        raise RecipeError(_malformed(text, f"the range {found[0]}, which runs backwards"))
    return BlockRange(first, last)


def _glob_pieces(text: str, ranges: int) -> list[str]:
    pieces = _SINGLE.split(text)
    if ranges > MAX_RANGES:
        raise RecipeError(_malformed(text, f"more than {MAX_RANGES} block ranges"))
    if any("{" in piece or "}" in piece for piece in pieces):
        raise RecipeError(_malformed(text, "braces that hold no block range"))
    if _WIDE_CLASS.search(text):
        got = "a range of numbers in brackets, which stand for one character"
        raise RecipeError(_malformed(text, got, "braces around a range of blocks: {0-18}"))
    return pieces


def _malformed(text: str, got: str, expected: str = _SYNTAX) -> Problem:
    return Problem(f"the pattern {shown(text)} cannot be understood", got=got, expected=expected)


def _regex(text: str) -> Pattern:
    from re import _parser  # type: ignore[attr-defined]  # the parse tree that re.compile itself works from

    bare = text.removeprefix("re:")
    try:
        with warnings.catch_warnings(action="error"):
            compiled, ways = re.compile(bare), _ways(_parser.parse(bare))
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise RecipeError(_malformed(text, f"a regular expression with an error: {shown(str(error))}")) from None
    if ways > MAX_WAYS:
        got = "a regular expression that could take forever to match"
        raise RecipeError(_malformed(text, got, _RULE))
    return Pattern(text, (compiled,), cost=max(ways, GLOB_COST))


def _ways(tree: object) -> int:
    """A bound on the ways a parsed expression can try to match; above MAX_WAYS it is not exact."""
    product = 1
    for code, given in tree:  # type: ignore[attr-defined]
        product *= _ways_of(str(code), given)
        if product > MAX_WAYS:
            return MAX_WAYS + 1
    return product


def _ways_of(code: str, given: tuple[object, ...]) -> int:
    """The codes are those of CPython's re/_constants.py; one that is not listed here is refused."""
    if code in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
        return 1
    if code == "SUBPATTERN":
        return _ways(given[3])
    if code == "BRANCH":
        return sum(map(_ways, given[1]))  # type: ignore[call-overload]
    if code in ("MAX_REPEAT", "MIN_REPEAT"):
        return _ways_of_repeat(*given)  # type: ignore[arg-type]
    return MAX_WAYS + 1


def _ways_of_repeat(least: int, most: int, tree: object) -> int:
    once = _ways(tree)
    if tree.getwidth()[0] == 0:  # type: ignore[attr-defined]  # repeats of nothing end at no name's end
        return MAX_WAYS + 1
    if once == 1:
        return min(most - least + 1, OPEN_WAYS)
    enough = math.ceil(math.log2(MAX_WAYS)) + 1
    return sum(once**count for count in range(min(least, enough), min(most, enough) + 1))
