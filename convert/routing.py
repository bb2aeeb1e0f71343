"""Which backend every layer of a component gets: the one matcher.

Patterns match whole dotted names, never parts of them. What is kept comes first, then the first rule that
matches, then the component's default backend.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import combinations

from bitroute.convert.document import KeyPath
from bitroute.convert.recipe import ComponentRecipe, Rule
from bitroute.errors import Problem, RecipeError, did_you_mean

__all__ = ["Layers", "Pattern", "Route", "route"]

MAX_PATTERN_LENGTH = 300
MAX_RANGES = 4
KEEP_SHOWN = 12  # layers in a suggested keep list
_RANGE = re.compile(r"\{(-?\d{1,6})(?:-(-?\d{1,6}))?\}")
_DIGITS = re.compile(r"\d+")
_QUANTIFIER = re.compile(r"[*+]|\{\d*,?\d*\}")
_SYNTAX = "`*`, `?`, `[...]`, block ranges such as {0-3}, {5} or {-2--1}, or `re:` and a regular expression"


@dataclass(frozen=True)
class Route:
    """What one layer gets, and the recipe value that decided it."""

    backend: str
    options: Mapping[str, object]
    otherwise: str
    source: KeyPath
    label: str  # "rule 2", "keep (profile)", "default"


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
    """Pieces of a name with a block range between each two of them."""

    text: str
    pieces: tuple[re.Pattern[str], ...]
    ranges: tuple[BlockRange, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Raises RecipeError without a place: the caller knows where the pattern stands."""
        if len(text) > MAX_PATTERN_LENGTH:
            expected = f"at most {MAX_PATTERN_LENGTH} characters"
            raise RecipeError(Problem("a pattern is too long", got=f"{len(text)} characters", expected=expected))
        if text.startswith("re:"):
            return cls(text, (_regex(text.removeprefix("re:")),))
        ranges = tuple(_block_range(text, found) for found in _RANGE.finditer(text))
        if len(ranges) > MAX_RANGES:
            raise RecipeError(_malformed(text, f"more than {MAX_RANGES} block ranges"))
        pieces = re.split(r"\{-?\d{1,6}(?:--?\d{1,6})?\}", text)
        if any("{" in piece or "}" in piece for piece in pieces):
            raise RecipeError(_malformed(text, "braces that hold no block range"))
        return cls(text, tuple(re.compile(fnmatch.translate(piece)) for piece in pieces), ranges)

    def placements(self, name: str) -> Iterator[tuple[re.Match[str], ...]]:
        """Every way to match the whole name with some number at each range."""
        for numbers in combinations(_DIGITS.finditer(name) if self.ranges else (), len(self.ranges)):
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
        self.block_counts: dict[str, int] = {}
        for name in self.names:
            for number in _DIGITS.finditer(name):
                prefix, count = name[: number.start()], int(number.group()) + 1
                self.block_counts[prefix] = max(self.block_counts.get(prefix, 0), count)

    def matching(self, pattern: Pattern) -> list[str]:
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


def route(
    component: str,
    recipe: ComponentRecipe,
    linear: Sequence[str],
    other: Sequence[str],
    roles: Mapping[str, str],
    kept: Mapping[str, str],
    where: Callable[[KeyPath], str],
) -> tuple[dict[str, Route], list[Problem]]:
    """A route for every layer, and what is wrong with the rules.

    linear, other: full names of the linear layers, and of the other layers that have a weight.
    roles: name → role, and kept: name → reason, both as the profile of the model class says.
    where: the place of a recipe value as `file:line`.
    """
    router = _Router(component, recipe, Layers([*linear, *other]), frozenset(linear), roles, where)
    router.keep(kept)
    for index, rule in enumerate(recipe.rules):
        router.apply(index, rule)
    router.fill()
    return {name: router.routes[name] for name in router.layers.names}, router.problems


@dataclass
class _Router:
    component: str
    recipe: ComponentRecipe
    layers: Layers
    linear: frozenset[str]
    roles: Mapping[str, str]
    where: Callable[[KeyPath], str]
    routes: dict[str, Route] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def path(self) -> KeyPath:
        return ("components", self.component)

    def keep(self, profile: Mapping[str, str]) -> None:
        label, names = "keep (profile)", [name for name in self.layers.names if name in profile]
        if isinstance(self.recipe.keep, list):
            label, names = "keep (list)", []
            for index, text in enumerate(self.recipe.keep):
                names += self._matching(text, (*self.path, "keep", index))
        elif self.recipe.keep == "none":
            names = []
        self._assign(names, Route("keep", {}, "keep", (*self.path, "keep"), label))

    def apply(self, index: int, rule: Rule) -> None:
        source = (*self.path, "rules", index)
        matched = self._of_role(rule.role, source) if rule.role else self._matching(rule.layers or "", source)
        eligible = matched if rule.backend == "keep" else [name for name in matched if name in self.linear]
        free = [name for name in eligible if name not in self.routes]
        if matched and not eligible:
            self.problems.append(self._not_linear(rule, source, matched))
        elif eligible and not free:
            self.problems.append(self._never_wins(rule, source, eligible))
        self._assign(free, Route(rule.backend, rule.options, rule.otherwise, source, f"rule {index + 1}"))

    def fill(self) -> None:
        recipe = self.recipe
        default = Route(recipe.backend, recipe.options, recipe.otherwise, self.path, "default")
        untouched = Route("keep", {}, "keep", self.path, "not a linear layer")
        for name in self.layers.names:
            suits = name in self.linear or recipe.backend == "keep"
            self.routes.setdefault(name, default if suits else untouched)

    def _assign(self, names: Sequence[str], chosen: Route) -> None:
        for name in names:
            self.routes.setdefault(name, chosen)

    def _matching(self, text: str, source: KeyPath) -> list[str]:
        place = self.where((*source, "layers"))
        try:
            pattern = Pattern.parse(text)
        except RecipeError as error:
            self.problems += [Problem(p.what, place, p.got, p.expected, p.next_step) for p in error.problems]
            return []
        names, outside = self.layers.matching(pattern), self.layers.outside(pattern)
        if outside:
            self.problems.append(Problem(f"{text!r} reaches outside the model", place, outside))
        elif not names:
            what = f"{text!r} matches no layer of {self.component}"
            self.problems.append(Problem(what, place, next_step=_nearest(text, self.component, self.layers)))
        return names

    def _of_role(self, role: str, source: KeyPath) -> list[str]:
        names = [name for name in self.layers.names if self.roles.get(name) == role]
        place, known = self.where((*source, "role")), sorted(set(self.roles.values()))
        if not known:
            what = f"role {role!r} means nothing here: {self.component} has no profile"
            self.problems.append(Problem(what, place, next_step="name the layers by a pattern: `layers:`"))
        elif not names:
            what, listed = f"no layer of {self.component} has the role {role!r}", "one of " + ", ".join(known)
            self.problems.append(Problem(what, place, expected=listed, next_step=did_you_mean(role, known)))
        return names

    def _not_linear(self, rule: Rule, source: KeyPath, matched: Sequence[str]) -> Problem:
        return Problem(
            f"{_said(rule)} matches only layers that are not linear",
            self.where(source),
            got=_some(matched),
            expected=f"linear layers: {rule.backend} holds no others",
            next_step="remove the rule (they stay as they are), or give it `backend: keep`",
        )

    def _never_wins(self, rule: Rule, source: KeyPath, eligible: Sequence[str]) -> Problem:
        takers = {self.routes[name].label: self.routes[name] for name in eligible}
        earlier = [f"{label} ({self.where(taken.source)})" for label, taken in takers.items()]
        by_keep = all(label.startswith("keep") for label in takers)
        mend = self._keep_without(eligible) if by_keep else "move it above them, or remove it"
        take = "takes" if len(earlier) == 1 else "take"
        what = f"{_said(rule)} can never win: {' and '.join(earlier)} already {take} what it matches"
        return Problem(what, self.where(source), got=_some(eligible), next_step=mend)

    def _keep_without(self, wanted: Sequence[str]) -> str:
        """The `keep` list that leaves these layers to the rules; layers that are not linear need no mention."""
        kept = [name for name, taken in self.routes.items() if taken.label.startswith("keep") and name in self.linear]
        rest = [name for name in kept if name not in set(wanted)]
        more = ", …" if len(rest) > KEEP_SHOWN else ""
        return f"keep the others only: `keep: [{', '.join(rest[:KEEP_SHOWN])}{more}]`" if rest else "say `keep: none`"


def _said(rule: Rule) -> str:
    return f"role {rule.role!r}" if rule.role else repr(rule.layers)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _nearest(text: str, component: str, layers: Layers) -> str:
    """How the pattern would have to be written to match something."""
    bare = text.removesuffix(".weight").removesuffix(".bias").removeprefix(f"{component}.")
    for attempt in (bare, f"*.{bare}", f"{bare}.*", f"*.{bare}.*", f"*{bare}*"):
        fits = not text.startswith("re:") and len(attempt) <= MAX_PATTERN_LENGTH
        names = layers.matching(Pattern.parse(attempt)) if fits else []
        if names:
            return f"a pattern is the whole name of a layer: {attempt!r} matches {len(names)} ({_some(names)})"
    shapes = list(dict.fromkeys(_DIGITS.sub("*", name) for name in layers.names))
    near = get_close_matches(_RANGE.sub("*", text.removeprefix("re:")), shapes, n=3, cutoff=0.5)
    return "near names: " + ", ".join(near) if near else "`quantize inspect` lists the layers of a model"


def _block_range(text: str, found: re.Match[str]) -> BlockRange:
    first, last = int(found[1]), int(found[2] or found[1])
    if first > last and (first < 0) == (last < 0):
        raise RecipeError(_malformed(text, f"the range {found[0]}, which runs backwards"))
    return BlockRange(first, last)


def _malformed(text: str, got: str) -> Problem:
    return Problem(f"the pattern {text!r} cannot be understood", got=got, expected=_SYNTAX)


def _regex(text: str) -> re.Pattern[str]:
    if _nests_repeats(text):
        got = "a repeat or a choice inside a repeated group, which can take forever to match"
        raise RecipeError(_malformed(f"re:{text}", got))
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise RecipeError(_malformed(f"re:{text}", f"a regular expression with an error: {error}")) from None


def _nests_repeats(text: str) -> bool:
    """Whether a group that holds a repeat or a choice is itself repeated, as in (a+)+ and (a|aa)*."""
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", text)
    repeats_inside = [False]
    for at, character in enumerate(plain):
        if character == "(":
            repeats_inside.append(False)
        elif character == ")" and len(repeats_inside) > 1:
            inside = repeats_inside.pop()
            if inside and _QUANTIFIER.match(plain, at + 1):
                return True
            repeats_inside[-1] |= inside
        elif character == "|" or _QUANTIFIER.match(plain, at):
            repeats_inside[-1] = True
    return False
