"""A choice for every layer as a recipe that people can read: a default, rules for what differs, and why.

The recipe is planned before it is written: it must give every layer what was chosen, in the bytes that were counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from bitroute.backends.base import Backend
from bitroute.calibrate.search_space import Assignment, Layer, Space
from bitroute.convert.fold import Fold, fold
from bitroute.convert.plan import Plan, plan_pipeline
from bitroute.convert.profile import ProfileFile
from bitroute.convert.recipe import RecipeFile
from bitroute.convert.statistics import StatisticsFile
from bitroute.errors import JobError, Problem

__all__ = ["Draft", "group_of", "planned_recipe", "recipe_text"]

Errors = Mapping[str, Mapping[str, float]]  # layer → label → squared error
WIDTH = 120
LONGEST_PATTERN = 280
MOST_RANGES = 100  # `{a-b}` patterns in one component, which take time to match; more are regular expressions


@dataclass(frozen=True)
class Draft:
    """Everything that a recipe says beside the layers of the component.

    source: `model`, and its `revision` and `variant`. head: lines of the comment at its top. base: has the recipes of
    other components. statistics: the file that the candidates need, seen from the recipe.
    """

    source: Mapping[str, str]
    head: Sequence[str]
    description: str
    base: RecipeFile
    container: str = "auto"
    statistics: str | None = None
    eval: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class _Rule:
    key: str  # `layers: "…"` or `role: …`
    candidate: str
    layers: Sequence[Layer]


def group_of(layer: str) -> str:
    """The name without its block number: layers of one group become one line, if they are treated alike."""
    found = fold([layer])[0]
    return f"{found.before}*{found.after}" if found.numbers else layer


def recipe_text(space: Space, chosen: Assignment, errors: Errors, draft: Draft) -> str:
    default = _most({layer.name: layer for layer in space.layers}.values(), chosen)
    rules = list(_rules(space.layers, chosen, default))
    if sum("{" in rule.key for rule in rules) > MOST_RANGES:
        rules = list(_rules(space.layers, chosen, default, ranges=False))
    taken = {layer.name for rule in rules for layer in rule.layers}
    rest = [layer for layer in space.layers if layer.name not in taken]
    say = _Words(space, chosen, errors, default)
    lines = [
        *(f"# {line}".rstrip() for line in draft.head),
        f"description: {json.dumps(draft.description, ensure_ascii=False)}",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in draft.source.items()),
        *([f"statistics: {json.dumps(draft.statistics, ensure_ascii=False)}"] if draft.statistics else []),
        "components:",
        f"  {space.component.name}:",
        f"    # {say.of(rest)}: what no rule below takes",
        *(f"    {line}" for line in _backend(space.candidates[default])),
        "    keep: none                 # the search has decided about every linear layer",
        *([f"    container: {draft.container}"] if draft.container != "auto" else []),
        *_own_profile(space.component.name, draft.base),
        *(["    rules:"] if rules else []),
    ]
    for rule in rules:
        first, *more = _backend(space.candidates[rule.candidate])
        lines += [f"      # {say.of(rule.layers)}", f"      - {rule.key}", f"        {first}"]
        lines += [f"        {line}" for line in more]
    lines += [*_others(space, draft.base), *(_section("eval", draft.eval) if draft.eval else [])]
    return "\n".join(lines) + "\n"


def planned_recipe(
    space: Space, chosen: Assignment, text: str, draft: Draft, name: str, statistics: StatisticsFile | None = None
) -> Plan:
    """The plan of the recipe.

    Raises:
        JobError: it is not what was chosen, which is a mistake of this program. RecipeError: it is no valid recipe.
    """
    file = RecipeFile.made(name, text)
    plan = plan_pipeline(replace(file, profiles=draft.base.profiles), space.planned.pipeline, statistics)
    part = next(part for part in plan.components if part.name == space.component.name)
    found = {entry.layer: str(entry.backend) for entry in part.entries if entry.kind == "Linear"}
    wrong = [layer for layer, candidate in chosen.items() if found.get(layer) != candidate]
    if wrong or part.size_bytes != space.size_bytes(chosen):
        got = f"{found.get(wrong[0])} for {wrong[0]}" if wrong else f"{part.size_bytes} bytes"
        expected = chosen[wrong[0]] if wrong else f"{space.size_bytes(chosen)} bytes"
        raise JobError(Problem("the recipe does not say what was chosen", name, got, expected))
    return plan


def _rules(layers: Sequence[Layer], chosen: Assignment, default: str, ranges: bool = True) -> Iterator[_Rule]:
    """What differs from its role, folded; then the roles that differ from the default."""
    roles: dict[str, list[Layer]] = {}
    for layer in layers:
        roles.setdefault(layer.role, []).append(layer)
    common = {role: _most(found, chosen) if role else default for role, found in roles.items()}
    exceptions: dict[str, list[Layer]] = {}
    for layer in layers:
        if chosen[layer.name] != common[layer.role]:
            exceptions.setdefault(chosen[layer.name], []).append(layer)
    for candidate, found in exceptions.items():
        yield from _folded(candidate, found, ranges)
    for role, found in roles.items():
        alike = [layer for layer in found if chosen[layer.name] == common[role]]
        if common[role] != default and len(alike) == 1:
            yield from _folded(common[role], alike, ranges)
        elif common[role] != default:
            yield _Rule(f"role: {role}", common[role], alike)


def _most(layers: Iterable[Layer], chosen: Assignment) -> str:
    """The candidate of most of the weights."""
    weights: dict[str, int] = {}
    for layer in layers:
        weights[chosen[layer.name]] = weights.get(chosen[layer.name], 0) + layer.source.spec.numel
    return max(weights, key=lambda candidate: weights[candidate])


def _folded(candidate: str, layers: Sequence[Layer], ranges: bool) -> Iterator[_Rule]:
    """Names that differ in their block numbers, and those with the same numbers, share a rule."""
    by_name = {layer.name: layer for layer in layers}
    alike: dict[tuple[str, tuple[int, ...]], list[Fold]] = {}
    for found in fold(by_name):
        alike.setdefault((found.before, found.numbers) if found.numbers else (found.before, ()), []).append(found)
    for folds in alike.values():
        for part in _short_enough(folds):
            names = [name for found in part for name in found.names]
            yield _Rule(f"layers: {json.dumps(_pattern(part, ranges))}", candidate, [by_name[name] for name in names])


def _short_enough(folds: Sequence[Fold]) -> list[Sequence[Fold]]:
    if len(folds) == 1 or len(_pattern(folds)) <= LONGEST_PATTERN:
        return [folds]
    middle = len(folds) // 2
    return [*_short_enough(folds[:middle]), *_short_enough(folds[middle:])]


def _pattern(folds: Sequence[Fold], ranges: bool = True) -> str:
    """Exactly the names of folds that differ in what stands after the number."""
    first = folds[0]
    if not first.numbers:
        return first.before
    numbers = first.numbers
    in_a_row = numbers == tuple(range(numbers[0], numbers[-1] + 1))
    if len(folds) == 1 and len(numbers) == 1:
        return f"{first.before}{numbers[0]}{first.after}"
    if len(folds) == 1 and in_a_row and ranges:
        return f"{first.before}{{{numbers[0]}-{numbers[-1]}}}{first.after}"
    shared = _shared([found.after for found in folds]) if len(folds) > 1 else first.after
    ends = "|".join(re.escape(found.after.removeprefix(shared)) for found in folds)
    behind = re.escape(shared) + (f"({ends})" if len(folds) > 1 else "")
    which = f"({'|'.join(map(str, numbers))})" if len(numbers) > 1 else str(numbers[0])
    return f"re:{re.escape(first.before)}{which}{behind}"


def _shared(names: Sequence[str]) -> str:
    """The parts that all names begin with, each with its dot."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{alike[0]}." for alike in takewhile(lambda found: len(set(found)) == 1, parts))


def _backend(backend: Backend) -> list[str]:
    """As a component or a rule says it."""
    options = dict(backend.options)
    method = options.pop("method", None)
    lines = [f"backend: {backend.name}"]
    lines += [f"options: {_flow(options)}"] if options else []
    return lines + ([f"method: {_flow(method)}"] if method else [])


@dataclass(frozen=True)
class _Words:
    """Why: how many layers, their bits, their part of the error, and what it would be as most others are."""

    space: Space
    chosen: Assignment
    errors: Errors
    default: str

    def of(self, layers: Sequence[Layer]) -> str:
        if not layers:
            return "no layer"
        size_bytes = sum(layer.size_bytes[self.chosen[layer.name]] for layer in layers)
        bits = 8 * size_bytes / sum(layer.source.spec.numel for layer in layers)
        found = self._error(layers, self.chosen)
        count = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
        words = f"{count}, {bits:.2f} bits, {self._share(found)} of the error"
        if any(self.chosen[layer.name] == self.default or self.default not in layer.size_bytes for layer in layers):
            return words
        other = self._error(layers, dict.fromkeys((layer.name for layer in layers), self.default))
        return f"{words} ({self._share(other)} as {self.default})"

    def _error(self, layers: Sequence[Layer], chosen: Assignment) -> float:
        return sum(self.errors[layer.name].get(chosen[layer.name], 0.0) for layer in layers)

    def _share(self, error: float) -> str:
        total = self._error(self.space.layers, self.chosen)
        return f"{error / total:.1%}".replace("%", " %") if total else "0 %"


def _others(space: Space, base: RecipeFile) -> Iterator[str]:
    """The other components as the base recipe has them."""
    said = base.recipe.components if base.recipe else {}
    for name, component in said.items():
        if name != space.component.name:
            content = component.model_dump(mode="json", exclude_defaults=True)
            if name in base.profiles:
                content["profile"] = _absolute(base.profiles[name])
            yield from (f"  {line}" for line in _section(name, content))


def _own_profile(name: str, base: RecipeFile) -> list[str]:
    own = base.profiles.get(name)
    return [f"    profile: {json.dumps(_absolute(own))}"] if own else []


def _absolute(profile: ProfileFile) -> str:
    """The base recipe names it relative to itself."""
    return str(Path(profile.document.file).resolve())


def _section(name: str, content: Mapping[str, Any]) -> list[str]:
    dumped = yaml.safe_dump({name: dict(content)}, sort_keys=False, allow_unicode=True, width=WIDTH)
    return str(dumped).rstrip("\n").split("\n")


def _flow(content: Mapping[str, Any]) -> str:
    dumped = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, default_flow_style=True, width=10**6)
    return str(dumped).strip()
