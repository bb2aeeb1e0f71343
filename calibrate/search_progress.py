"""Progress of a search on stderr: counts, the rate, and the time that is left."""

from __future__ import annotations

import sys
import time
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Counts:
    """A bar for each stage on a terminal; elsewhere a line at each tenth of a stage."""

    def __init__(self) -> None:
        self._live: Progress | None = None
        self._task: Any = None
        self.what, self.tenth, self.begun = "", -1, 0.0

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
            self._live = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, what: str, done: int, total: int) -> None:
        """total: 0 where it is one thing."""
        if what != self.what:
            self.what, self.tenth, self.begun = what, -1, time.monotonic()
            if self._live:
                self._task = self._live.add_task(escape(what), total=total or None)
        if self._live:
            self._live.update(self._task, completed=done, total=total or None)
        elif (tenth := done * 10 // total if total else 0) > self.tenth:
            self.tenth = tenth
            print(f"searching: {what}{self._far(done, total)}", file=sys.stderr)

    def _far(self, done: int, total: int) -> str:
        if not total:
            return ""
        left = (time.monotonic() - self.begun) * (total - done) / done if done else None
        return f", {done} of {total}" + (f", about {left:.0f} s left" if left is not None and done < total else "")
