"""Runs `quantize` in forks of one warm process and ends them at chosen moments: importing torch for each takes seconds.

A request is a JSON line: the words of the command, and optionally a signal and its moment, which is ["change", n],
before the n-th change of a name in the folder; ["block", n], after the n-th block of rows; or ["time", seconds].
"""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import bitroute.convert.plan as planning
from bitroute.cli import main
from bitroute.convert import job, output  # noqa: F401 - loaded before the forks
from bitroute.convert.progress import Bar

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
SHARD_BYTES = 1_000_000  # several shards of each component


class Moment:
    """Counts what happens below a folder, and sends this process the signal when it is time."""

    def __init__(self, folder: str, moment: list[Any] | None, number: int) -> None:
        self.folder, self.moment, self.number = folder, moment, number
        self.counts = {"change": 0, "block": 0}

    def count(self, kind: str) -> None:
        self.counts[kind] += 1
        if self.moment == [kind, self.counts[kind]]:
            os.kill(os.getpid(), self.number)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and str(arguments[0]).startswith(self.folder):
            self.count("change")

    def install(self) -> None:
        advance = Bar.advance

        def advance_and_count(bar: Bar, done_bytes: int, what: str) -> None:
            advance(bar, done_bytes, what)
            self.count("block")

        Bar.advance = advance_and_count  # type: ignore[method-assign]
        sys.addaudithook(self.hook)


def perform(request: dict[str, Any], said: Path) -> int:
    """The exit code; everything printed goes to the file `said`, and at last the counts."""
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["quantize", *request["words"]]
    moment = Moment(str(said.parent), request.get("moment"), request.get("signal", signal.SIGKILL))
    moment.install()
    try:
        main(request["words"], prog_name="quantize")
    except SystemExit as end:
        counts = dict(moment.counts)
        print(json.dumps(counts), flush=True)
        return int(end.code or 0)
    return 0


def answer(request: dict[str, Any], said: Path) -> dict[str, Any]:
    """The child's exit code, or its signal as a negative number, and what it printed."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os._exit(perform(request, said))
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    if request.get("moment", [""])[0] == "time":
        time.sleep(request["moment"][1])
        os.kill(child, request.get("signal", signal.SIGKILL))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"code": code, "said": said.read_text(), "seconds": time.monotonic() - start}


def serve(said: Path) -> None:
    planning.SHARD_BYTES = SHARD_BYTES
    planning.plan = functools.cache(planning.plan)  # type: ignore[assignment]
    for recipe in sys.argv[2:]:
        planning.plan(recipe, None)
    gc.freeze()  # so that a fork need not copy what its collector would touch
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), said)), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
