"""The best choices for budgets of all sizes, and how much error each is expected to leave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from bitroute.backends.base import Backend
from bitroute.calibrate.search_candidates import KEEP
from bitroute.calibrate.search_recipe import group_of
from bitroute.calibrate.search_solver import Option, smallest, solve
from bitroute.calibrate.search_space import Assignment, Space
from bitroute.errors import JobError, Problem

__all__ = ["Front", "Point"]

SWEEP = 24  # budgets, evenly spread over the logarithm of the size


@dataclass(frozen=True)
class Point:
    """A choice for every layer. Errors are ||y' - y|| / ||y|| of the denoiser's output, root mean square."""

    name: str
    chosen: Assignment
    size_bytes: int  # of the component
    checkpoint_bytes: int
    bits: float
    predicted: float
    measured: float | None = None

    def measured_as(self, squared_error: float) -> Point:
        return replace(self, measured=math.sqrt(squared_error))


@dataclass(frozen=True)
class Front:
    """errors: layer → label → squared error. families: candidates that may stand beside each other."""

    space: Space
    errors: Mapping[str, Mapping[str, float]]
    families: Sequence[Sequence[Backend]]
    give_up: float

    def best(self, budget_bytes: int, name: str = "chosen", simple: bool = True) -> Point:
        """The least error within so many bytes of linear weights; simple: a little more, for fewer rules."""
        give_up, fitting = self.give_up if simple else 0.0, (s for s in self._spaces if self._least(s) <= budget_bytes)
        found = [self._best(space, budget_bytes, name, give_up) for space in fitting]
        if not found:
            what = "the budget is too small for the candidates that gave numbers"
            raise JobError(Problem(what, got=f"{budget_bytes:,} bytes for the weights of linear layers"))
        return min(found, key=lambda point: (point.predicted, point.size_bytes))

    def simple(self, point: Point) -> Point:
        """Of the same size at most, with fewer rules."""
        return self.best(point.size_bytes - self.space.fixed_bytes)

    def sweep(self, count: int = SWEEP) -> list[Point]:
        """From the smallest choice to that of the least error; equal ones once."""
        low = min(self._least(space) for space in self._spaces)
        high = max(self._most(space) for space in self._spaces)
        budgets = [math.ceil(low * (high / low) ** (step / (count - 1))) for step in range(count)]
        points: list[Point] = []
        for point in (self.best(budget, "front", simple=False) for budget in budgets):
            if not points or point.predicted < points[-1].predicted:
                points.append(point)
        return points

    def uniform(self, listed: Space) -> list[Point]:
        """Each candidate of a list wherever it can be; without those that few layers have, that were not measured,
        or gave no numbers."""
        most = sum(len(layer.size_bytes) > 1 for layer in listed.layers) / 2
        names = [name for name in listed.candidates if name != KEEP and len(listed.held(name)) > most]
        names = [name for name in names if listed.held(name) == self.space.held(name)]
        points = [self.point(self.space.uniform(name), f"all {name}") for name in names]
        return sorted((p for p in points if math.isfinite(p.predicted)), key=lambda point: point.size_bytes)

    def point(self, chosen: Assignment, name: str) -> Point:
        size_bytes = self.space.size_bytes(chosen)
        error = sum(self.errors[layer][candidate] for layer, candidate in chosen.items())
        return Point(
            name, chosen, size_bytes, size_bytes + self.space.other_bytes, self.space.bits(chosen), math.sqrt(error)
        )

    @cached_property
    def _spaces(self) -> list[Space]:
        """Those in which every layer has a choice that gave numbers."""
        spaces = [self.space.only(family) for family in self.families]
        if found := [space for space in spaces if all(self._items(space))]:
            return found
        raise JobError(Problem("no format gave numbers for some layer", next_step="add other --candidates"))

    def _best(self, space: Space, budget_bytes: int, name: str, give_up: float) -> Point:
        items = self._items(space)
        groups = [group_of(layer.name) for layer in space.layers]
        indices = solve(items, budget_bytes, groups, give_up)
        chosen = {
            layer.name: options[index].kind for layer, options, index in zip(space.layers, items, indices, strict=True)
        }
        return self.point(chosen, name)

    def _items(self, space: Space) -> list[list[Option]]:
        """What gave no number is no option."""
        return [
            [
                Option(candidate, size_bytes, self.errors[layer.name][candidate])
                for candidate, size_bytes in layer.size_bytes.items()
                if math.isfinite(self.errors[layer.name][candidate])
            ]
            for layer in space.layers
        ]

    def _least(self, space: Space) -> int:
        return smallest(self._items(space))

    def _most(self, space: Space) -> int:
        """The bytes above which nothing gets better."""
        best = (min(options, key=lambda option: (option.error, option.size_bytes)) for options in self._items(space))
        return sum(option.size_bytes for option in best)
