"""Progress on stderr: a bar with rate and time left on a terminal, a line every tenth of the way elsewhere."""

from __future__ import annotations

import sys
from threading import Lock
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, TransferSpeedColumn


class Bar:
    """`advance` may be called from any thread."""

    def __init__(self, title: str, total_bytes: int) -> None:
        self.title, self.total_bytes, self.done_bytes, self.tenth = title, total_bytes, 0, 0
        self._turn = Lock()
        self._live: Progress | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._live = _live()
            self._live.start()
            self._task = self._live.add_task(self.title, total=self.total_bytes or None, what="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def advance(self, done_bytes: int, what: str) -> None:
        with self._turn:
            self.done_bytes += done_bytes
            if self._live:
                self._live.update(self._task, advance=done_bytes, what=escape(what))
            elif self.total_bytes and self.done_bytes * 10 // self.total_bytes > self.tenth:
                self.tenth = self.done_bytes * 10 // self.total_bytes
                print(f"{self.title}: {self.tenth * 10} % of {self.total_bytes / 1e6:,.1f} MB", file=sys.stderr)


class Stages:
    """What is worked on, and how far: one changing line on a terminal, a line for each stage elsewhere."""

    def __init__(self, title: str) -> None:
        self.title, self._live = title, Console(stderr=True).status("")

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def say(self, what: str, far: str) -> None:
        if sys.stderr.isatty():
            self._live.update(escape(f"{self.title}: {what}{f', {far}' if far else ''}"))
        elif not far:
            print(f"{self.title}: {what}", file=sys.stderr)


def _live() -> Progress:
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), TransferSpeedColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[what]}"),
    )  # fmt: skip
    return Progress(*columns, console=Console(stderr=True), transient=True)
