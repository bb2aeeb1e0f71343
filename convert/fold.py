"""Layer names that differ only in their block number, folded into ranges for tables and configs."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

_BLOCK = re.compile(r"(?<![^.])(0|[1-9]\d*)(?![^.])")  # without leading zeros: a number that unfolds to itself


@dataclass(frozen=True)
class Fold:
    """`before` + a block number + `after`, for each number; no numbers: the name is `before`."""

    before: str
    numbers: tuple[int, ...]
    after: str

    def __str__(self) -> str:
        return f"{self.before}{{{_ranges(self.numbers)}}}{self.after}" if self.numbers else self.before

    @property
    def regex(self) -> str:
        """Matches exactly the folded names, nothing else."""
        if not self.numbers:
            return re.escape(self.before)
        numbers = "|".join(str(number) for number in self.numbers)
        return f"{re.escape(self.before)}(?:{numbers}){re.escape(self.after)}"

    @property
    def names(self) -> list[str]:
        """The folded names."""
        return [f"{self.before}{number}{self.after}" for number in self.numbers] or [self.before]


def fold(names: Iterable[str]) -> list[Fold]:
    """Folds on the first block number of each name; the order of first appearance is kept."""
    groups: dict[tuple[str, str | None], list[int]] = {}
    for name in names:
        block = _BLOCK.search(name)
        if block is None:
            groups[name, None] = []
        else:
            groups.setdefault((name[: block.start()], name[block.end() :]), []).append(int(block.group()))
    return [Fold(before, tuple(sorted(numbers)), after or "") for (before, after), numbers in groups.items()]


def fold_by(keys: Mapping[str, Key]) -> list[tuple[Key, Fold]]:
    """Folds names that share a key; layer name → key in, (key, fold) pairs out."""
    by_key: dict[Key, list[str]] = {}
    for name, key in keys.items():
        by_key.setdefault(key, []).append(name)
    return [(key, folded) for key, names in by_key.items() for folded in fold(names)]


def _ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) → "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
