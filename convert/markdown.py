"""GitHub Markdown of words that come from strangers: nothing of them is read as Markdown or HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bitroute.convert.document import printable


def escaped(text: str) -> str:
    """Text that is shown as it is, on one line of a table too; links are not made of it."""
    line = " ".join(printable(" ".join(text.split())).split())
    line = re.sub(r"([\\`*_{}\[\]()<>#+!|~&$:@])", r"\\\1", line)
    return re.sub(r"(?i)(^\d*|www)([-.=])", r"\1\\\2", line)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The cells are Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [titles, ["---"] * len(titles), *rows])


def fenced(code: str, language: str) -> str:
    """A block of code whose fence no line of it closes."""
    lines = [printable(line.expandtabs()) for line in code.splitlines()]
    longest = max((len(run) for line in lines for run in re.findall(r"`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}{language}", *lines, fence])
