"""Every error that bitroute raises on purpose.

    BitrouteError
    ├── RecipeError     the recipe, or its plan, is refused before a weight is read     exit 2
    ├── SourceError     a source or a checkpoint cannot be read as what it claims to be exit 2
    ├── BackendError    a backend is unknown, unavailable or was given bad options      exit 2
    └── JobError        the job started and could not finish                            exit 1

An error carries one or more problems; each says what, where, got, expected and the next step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in the words of whoever has to mend it."""

    what: str
    where: str = ""
    got: str = ""
    expected: str = ""
    next_step: str = ""

    def __str__(self) -> str:
        """What is not printable is escaped; the lines of a detail stand below each other."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        details = [("got", self.got), ("expected", self.expected), ("next", self.next_step)]
        return "\n".join([printable(head), *(_detail(name, text) for name, text in details if text)])


class BitrouteError(Exception):
    """The root of the tree; `problems` is never empty."""

    exit_code = 1

    def __init__(self, problems: Problem | str | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        self.problems: Sequence[Problem] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RecipeError(BitrouteError):
    exit_code = 2


class SourceError(BitrouteError):
    exit_code = 2


class BackendError(BitrouteError):
    exit_code = 2


class JobError(BitrouteError):
    exit_code = 1


def _detail(name: str, text: str) -> str:
    return f"    {name + ':':<10}" + f"\n{'':<14}".join(map(printable, text.splitlines()))


def printable(text: str) -> str:
    """One line, without the characters that would act on the terminal: those are escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the known word nearest to `word`, or an empty string."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else ""
