"""Memory of a process as Linux tells it."""

from __future__ import annotations

from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

SAMPLING_SECONDS = 0.005


def memory(pid: int, what: str) -> int:
    """Bytes; 0 of a process that has ended. what: RssAnon, or VmHWM, the peak of all that is resident."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:")), 0)


class Watcher:
    """The peak of a process's anonymous memory, sampled by a second process: no lock of the first one delays it.

    Make it before the process has threads.
    """

    def __init__(self, pid: int) -> None:
        context = get_context("fork")
        self._here, there = context.Pipe()
        context.Process(target=_watch, args=(pid, self._here, there), daemon=True).start()

    def start(self) -> None:
        self._here.send("start")

    def stop(self) -> int:
        self._here.send("stop")
        peak: int = self._here.recv()
        return peak


def _watch(pid: int, theirs: Connection, mine: Connection) -> None:
    theirs.close()  # else the end of the watched process would not end this one
    mine.recv()
    peak = 0
    while not mine.poll(SAMPLING_SECONDS):
        peak = max(peak, memory(pid, "RssAnon"))
    mine.send(peak)
