"""The budgeted choice: one option for each item, the least total error whose total size stays within a budget.

A multiple-choice knapsack as an integer program, solved by HiGHS (scipy.optimize.milp). A second program then gives
up a little error for fewer distinct choices, so that the recipe stays readable.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from bitroute.errors import JobError, Problem, RecipeError

__all__ = ["Option", "check_solver", "smallest", "solve", "undominated"]

GAP = 1e-6  # relative, between what is found and the best that there can be
NODES = 20_000  # of the search tree: bounds the time, and unlike a clock the same on every run
NODES_OF_SIMPLER = 200


@dataclass(frozen=True)
class Option:
    """kind: options of one kind in the same group of items count once when the choice is made simple."""

    kind: str
    size_bytes: int
    error: float


Items = Sequence[Sequence[Option]]


def check_solver() -> None:
    """Raises RecipeError where scipy is not installed."""
    if find_spec("scipy") is None:
        mend = 'pip install "bitroute[search]"'
        raise RecipeError(Problem("the search needs an integer solver, scipy's", got="no scipy here", next_step=mend))


def smallest(items: Items) -> int:
    return sum(min(option.size_bytes for option in options) for options in items)


def solve(items: Items, budget_bytes: int, groups: Sequence[str] = (), give_up: float = 0.0) -> list[int]:
    """The index of the option of each item.

    groups: of each item; give_up: how much of the least error may be lost for fewer kinds in the groups, such as 0.01.

    Raises:
        JobError: not even the smallest options fit.
    """
    if smallest(items) > budget_bytes:
        got, expected = f"{budget_bytes} bytes", f"at least {smallest(items)} bytes"
        raise JobError(Problem("the budget is too small", got=got, expected=expected))
    chosen = _least_error(items, budget_bytes)
    if groups and give_up > 0:
        limit = (1 + give_up) * _error(items, chosen)
        every = [[index for index, option in enumerate(options) if option.error <= limit] for options in items]
        return _Program(items, every, budget_bytes).simplest(groups, limit) or chosen
    return chosen


def _least_error(items: Items, budget_bytes: int) -> list[int]:
    """Solved again without options that alone lose more than all that was found together, until there are none.

    The solver takes a ten-millionth of the largest number for nothing: beside one layer that a format ruins, it does
    not tell the others apart.
    """
    useful = [undominated(options) for options in items]
    best = [indices[0] for indices in useful]
    while True:
        chosen = _Program(items, useful, budget_bytes).least_error()
        best = min(best, chosen, key=lambda indices: _error(items, indices))
        least = _error(items, best)
        fewer = [
            [index for index in indices if options[index].error <= least]
            for options, indices in zip(items, useful, strict=True)
        ]
        if fewer == useful:
            return best
        useful = fewer


def _error(items: Items, chosen: Sequence[int]) -> float:
    return sum(options[index].error for options, index in zip(items, chosen, strict=True))


def undominated(options: Sequence[Option]) -> list[int]:
    """Without those that another one beats in both; of equal ones the first stays."""
    ordered = sorted(range(len(options)), key=lambda index: (options[index].size_bytes, options[index].error, index))
    kept: list[int] = []
    for index in ordered:
        if not kept or options[index].error < options[kept[-1]].error:
            kept.append(index)
    return kept


class _Program:
    """A variable of 0 or 1 for each useful option.

    Sizes are counted above the smallest choice, as shares of what the budget leaves above it: the solver allows a sum
    that is a millionth too large, and that is then a millionth of the room only.
    """

    def __init__(self, items: Items, useful: Sequence[Sequence[int]], budget_bytes: int) -> None:
        self.items, self.room_bytes = items, budget_bytes - smallest(items)
        least = [min(option.size_bytes for option in options) for options in items]
        self.columns = [
            (item, index) for item, indices in enumerate(useful) for index in indices
            if items[item][index].size_bytes - least[item] <= self.room_bytes
        ]  # fmt: skip
        self.extra = [items[item][index].size_bytes - least[item] for item, index in self.columns]
        self.options = [items[item][index] for item, index in self.columns]
        self.worst = max((option.error for option in self.options), default=0.0) or 1.0

    def least_error(self) -> list[int]:
        """The smallest options where the solver finds nothing else."""
        found = self._within_budget([option.error / self.worst for option in self.options], [], NODES)
        return found or [undominated(options)[0] for options in self.items]

    def simplest(self, groups: Sequence[str], limit: float) -> list[int] | None:
        """The fewest pairs of group and kind in use, the error at most `limit`; None where none is found in time."""
        pairs = [(groups[item], option.kind) for (item, _), option in zip(self.columns, self.options, strict=True)]
        used = {pair: len(self.columns) + number for number, pair in enumerate(dict.fromkeys(pairs))}
        rows = [({number: option.error / limit for number, option in enumerate(self.options)}, 1.0)] if limit else []
        rows += [({number: 1.0, used[pair]: -1.0}, 0.0) for number, pair in enumerate(pairs)]
        tie = 0.01 / max(len(self.items), 1)  # among equally simple ones, that of less error
        goal = [tie * option.error / self.worst for option in self.options] + [1.0] * len(used)
        found = self._within_budget(goal, rows, NODES_OF_SIMPLER)
        if found is None:
            return None
        return found if _error(self.items, found) <= limit * (1 + GAP) else None

    def _within_budget(
        self, goal: Sequence[float], rows: list[tuple[dict[int, float], float]], nodes: int
    ) -> list[int] | None:
        """Where the sum is too large all the same, the room shrinks, faster and faster, until the bytes fit."""
        room_bytes, shrink = self.room_bytes, 1
        while room_bytes >= 0 and (columns := self._solve(goal, rows, room_bytes, nodes)) is not None:
            excess_bytes = sum(self.extra[column] for column in columns) - self.room_bytes
            if excess_bytes <= 0:
                return [self.columns[column][1] for column in columns]
            room_bytes, shrink = room_bytes - shrink * excess_bytes, 2 * shrink
        return None

    def _solve(
        self, goal: Sequence[float], rows: list[tuple[dict[int, float], float]], room_bytes: int, nodes: int
    ) -> list[int] | None:
        from scipy.optimize import Bounds, LinearConstraint, milp

        size = {number: extra_bytes / max(room_bytes, 1) for number, extra_bytes in enumerate(self.extra)}
        one_each: list[dict[int, float]] = [{} for _ in self.items]
        for number, (item, _) in enumerate(self.columns):
            one_each[item][number] = 1.0
        upper = [1.0, *(limit for _, limit in rows), *(1.0 for _ in one_each)]
        lower = [-float("inf")] * (1 + len(rows)) + [1.0] * len(one_each)
        matrix = _sparse([size, *(row for row, _ in rows), *one_each], len(goal))
        with _silent():
            found: Any = milp(
                goal, integrality=[1] * len(goal), bounds=Bounds(0, 1),
                constraints=LinearConstraint(matrix, lower, upper), options={"mip_rel_gap": GAP, "node_limit": nodes},
            )  # fmt: skip
        if found.x is None:
            return None
        return [max(row, key=lambda number: found.x[number]) for row in one_each]


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS prints notes of its own to the process's stdout, where the results go."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _sparse(rows: Sequence[dict[int, float]], columns: int) -> Any:
    from scipy.sparse import csr_array

    places = [(row, column, value) for row, found in enumerate(rows) for column, value in found.items()]
    lines, across, values = zip(*places, strict=True)
    return csr_array((values, (lines, across)), shape=(len(rows), columns))
