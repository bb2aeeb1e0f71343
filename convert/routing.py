"""Which backend every layer of a component gets: the one matcher.

Patterns match whole dotted names, never parts of them. What is kept comes first, then the first rule that
matches, then the component's default backend.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

from bitroute.backends import Kind
from bitroute.convert.document import MAX_PROBLEMS, KeyPath, shown
from bitroute.convert.pattern import MAX_WAYS, RANGE, Layers, Pattern
from bitroute.convert.profile import EVERY_KIND
from bitroute.convert.schema import ComponentRecipe, Rule
from bitroute.errors import Problem, RecipeError, did_you_mean

__all__ = ["Route", "route"]

MAX_COST = 2 * MAX_WAYS  # of all patterns of a component: 2 to 4 s for 1000 names at the very worst
CONVOLUTION = "convolution"  # the role of those that a backend can take, given by their class
KEEP_SHOWN = 12  # layers in a suggested keep list
_DIGITS = re.compile(r"\d+")
_BARE_RANGE = re.compile(r"(?<![\w{-])(\d+-\d+)(?![\w}])")
_UNSEEN = Problem("one problem more than anyone reads")


@dataclass(frozen=True)
class Route:
    """What one layer gets, and the recipe value that decided it."""

    backend: str
    options: Mapping[str, object]
    otherwise: str
    source: KeyPath
    label: str  # "rule 2", "keep (profile)", "keep (profile, w8a8)", "keep (inferred)", "default"


def route(
    component: str,
    recipe: ComponentRecipe,
    linear: Sequence[str],
    other: Sequence[str],
    roles: Mapping[str, str],
    kept: Mapping[str, frozenset[Kind]],
    where: Callable[[KeyPath], str],
    origin: Literal["profile", "inferred"] = "profile",
    kind_of: Callable[[str, Mapping[str, object]], Kind | None] = lambda backend, options: None,
) -> tuple[dict[str, Route], list[Problem]]:
    """A route for every layer, and what is wrong with the rules.

    linear, other: full names of the linear layers, and of the other layers that have a weight.
    roles: name → role, and kept: name → in which kinds of quantization, both as the profile of the model class says;
        convolutions have a role of their own, and no backend but that of a rule takes them.
    where: the place of a recipe value as `file:line`.
    origin: where roles and kept come from.
    kind_of: a backend and its options → its kind.
    """
    router = _Router(
        component, recipe, Layers([*linear, *other]), frozenset(linear), roles, kept, origin, where, kind_of
    )
    router.keep()
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
    kept: Mapping[str, frozenset[Kind]]
    origin: str
    where: Callable[[KeyPath], str]
    kind_of: Callable[[str, Mapping[str, object]], Kind | None]
    routes: dict[str, Route] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    cost: int = 0

    @property
    def path(self) -> KeyPath:
        return ("components", self.component)

    def keep(self) -> None:
        """What stays whatever the backend: the list of the recipe, or what the profile keeps in every kind."""
        if isinstance(self.recipe.keep, list):
            for index, text in enumerate(self.recipe.keep):
                self._assign(self._matching(text, (*self.path, "keep", index)), self._kept("list"))
        elif self.recipe.keep == "profile":
            always = [name for name in self.layers.names if self.kept.get(name) == EVERY_KIND]
            self._assign(always, self._kept(self.origin))

    def _keep_from(self, names: Sequence[str], backend: str, options: Mapping[str, object]) -> None:
        """Of these, those that the profile keeps in the kind of quantization that the backend does."""
        kind = self.kind_of(backend, options) if self.recipe.keep == "profile" else None
        kept = [name for name in names if kind in self.kept.get(name, ())]
        self._assign(kept, self._kept(f"{self.origin}, {kind}"))

    def _kept(self, by: str) -> Route:
        return Route("keep", {}, "keep", (*self.path, "keep"), f"keep ({by})")

    def apply(self, index: int, rule: Rule) -> None:
        source = (*self.path, "rules", index)
        matched = self._of_role(rule.role, source) if rule.role else self._matching(rule.layers or "", source)
        eligible = matched if rule.backend == "keep" else self._quantizable(matched)
        self._keep_from(eligible, rule.backend, rule.encoding)
        free = [name for name in eligible if name not in self.routes]
        if matched and not eligible:
            self._report(self._not_quantizable, rule, source, matched)
        elif eligible and not free:
            self._report(self._never_wins, rule, source, eligible)
        self._assign(free, Route(rule.backend, rule.encoding, rule.otherwise, source, f"rule {index + 1}"))

    def _quantizable(self, matched: Sequence[str]) -> list[str]:
        """The linear layers; convolutions only where there are none, so that wide patterns do not reach them."""
        linear = [name for name in matched if name in self.linear]
        return linear or [name for name in matched if self.roles.get(name) == CONVOLUTION]

    def fill(self) -> None:
        recipe = self.recipe
        default = Route(recipe.backend, recipe.encoding, recipe.otherwise, self.path, "default")
        untouched = Route("keep", {}, "keep", self.path, "not a linear layer")
        self._keep_from(self.layers.names, recipe.backend, recipe.encoding)
        for name in self.layers.names:
            suits = name in self.linear or recipe.backend == "keep"
            self.routes.setdefault(name, default if suits else untouched)

    def _assign(self, names: Sequence[str], chosen: Route) -> None:
        for name in names:
            self.routes.setdefault(name, chosen)

    def _report(self, describe: Callable[..., Problem], *given: object) -> None:
        """The words take time to find, so nobody looks for those that will not be shown."""
        self.problems.append(describe(*given) if len(self.problems) < MAX_PROBLEMS else _UNSEEN)

    def _matching(self, text: str, source: KeyPath) -> list[str]:
        place = self.where((*source, "layers"))
        try:
            pattern = Pattern.parse(text)
        except RecipeError as error:
            self.problems += [Problem(p.what, place, p.got, p.expected, p.next_step) for p in error.problems]
            return []
        self.cost += pattern.cost
        if pattern.cost and self.cost > MAX_COST:
            self._report(self._too_costly, text, place)
            return []
        names, outside = self.layers.matching(pattern), self.layers.outside(pattern)
        if outside:
            self._report(Problem, f"{shown(text)} reaches outside the model", place, outside)
        elif not names:
            self._report(self._matches_nothing, text, place)
        return names

    def _of_role(self, role: str, source: KeyPath) -> list[str]:
        names = [name for name in self.layers.names if self.roles.get(name) == role]
        if not names:
            self._report(self._no_such_role, role, self.where((*source, "role")))
        return names

    def _too_costly(self, text: str, place: str) -> Problem:
        return Problem(
            f"{shown(text)} comes after too many other patterns: together they take too long",
            place,
            expected="fewer block ranges and regular expressions in one component",
            next_step="write layers out where you can: plain names cost nothing",
        )

    def _matches_nothing(self, text: str, place: str) -> Problem:
        hint = _nearest(text, self.component, self.layers)
        return Problem(f"{shown(text)} matches no layer of {self.component}", place, next_step=hint)

    def _no_such_role(self, role: str, place: str) -> Problem:
        known = sorted(set(self.roles.values()))
        if not known:
            what = f"role {shown(role)} means nothing here: {self.component} has no profile"
            return Problem(what, place, next_step="name the layers by a pattern: `layers:`")
        what = f"no layer of {self.component} has the role {shown(role)}"
        return Problem(what, place, "", "one of " + ", ".join(known), did_you_mean(role[:80], known))

    def _not_quantizable(self, rule: Rule, source: KeyPath, matched: Sequence[str]) -> Problem:
        return Problem(
            f"{_said(rule)} matches only layers that are not linear, and no plain convolutions",
            self.where(source),
            got=_some(matched),
            expected="linear layers, or convolutions that are neither transposed nor in groups (depthwise)",
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
        """The `keep` list that leaves these layers to the rules; what no rule can take needs no mention."""
        takers = self.linear | {name for name, role in self.roles.items() if role == CONVOLUTION}
        kept = [name for name, taken in self.routes.items() if taken.label.startswith("keep") and name in takers]
        freed = set(wanted)
        rest = [name for name in kept if name not in freed]
        more = ", …" if len(rest) > KEEP_SHOWN else ""
        return f"keep the others only: `keep: [{', '.join(rest[:KEEP_SHOWN])}{more}]`" if rest else "say `keep: none`"


def _said(rule: Rule) -> str:
    return f"role {shown(rule.role)}" if rule.role else shown(rule.layers)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _nearest(text: str, component: str, layers: Layers) -> str:
    """How the pattern would have to be written to match something."""
    braced = _BARE_RANGE.sub(r"{\1}", text) if _BARE_RANGE.search(text) else ""
    for attempt in _rewritings(text, component):
        names = layers.matching(attempt)
        if names:
            what = (
                "block ranges stand in braces" if attempt.text == braced else "a pattern is the whole name of a layer"
            )
            return f"{what}: {shown(attempt.text)} matches {len(names)} ({_some(names)})"
    shapes = list(dict.fromkeys(_DIGITS.sub("*", name) for name in layers.names))
    near = get_close_matches(RANGE.sub("*", text.removeprefix("re:")), shapes, n=3, cutoff=0.5)
    return "near names: " + ", ".join(near) if near else "`quantize inspect` lists the layers of a model"


def _rewritings(text: str, component: str) -> Iterator[Pattern]:
    bare = text.removesuffix(".weight").removesuffix(".bias").removeprefix(f"{component}.")
    bare = _BARE_RANGE.sub(r"{\1}", bare)
    for attempt in (bare, f"*.{bare}", f"{bare}.*", f"*.{bare}.*", f"*{bare}*"):
        with suppress(RecipeError):  # longer or with other ranges than a pattern can have
            if not text.startswith("re:"):
                yield Pattern.parse(attempt)
