"""Runs a module of bitroute.eval in a process of its own: a crash of a kernel stays there, and so does its memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE
from tempfile import TemporaryFile
from typing import Any

from bitroute.convert.garbage import collect_seldom
from bitroute.convert.noise import quiet
from bitroute.errors import JobError, Problem

Heard = Callable[[str], None]
FAR = re.compile(r"\d+ of \d+")


def run_apart(module: str, request: Mapping[str, Any], failed: str, where: Path, heard: Heard | None = None) -> None:
    """Gives the module the request as JSON on stdin; `heard` is told how far it is: `3 of 16`.

    Raises:
        JobError: `failed`, with what the process said last.
    """
    command = [sys.executable, "-P", "-m", module]
    with (
        TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=errors, text=True) as process,
    ):
        try:
            _talk(process, json.dumps(request), heard or (lambda line: None))
        except BaseException:  # an interrupt: the process must not go on alone
            process.kill()
            raise
        if process.returncode:
            errors.seek(0)
            raise JobError(Problem(failed, str(where), got=_reason(process.returncode, errors.read())))


def _talk(process: subprocess.Popen[str], request: str, heard: Heard) -> None:
    assert process.stdin and process.stdout
    with suppress(BrokenPipeError):  # it ended before it could listen, and has said why
        process.stdin.write(request)
        process.stdin.close()
    for line in process.stdout:
        if FAR.fullmatch(line.strip()):  # libraries print too
            heard(line.strip())
    process.wait()


def tell(done: int, total: int) -> None:
    """On the side that works: how far it is."""
    print(f"{done} of {total}", flush=True)


def answer(work: Callable[[dict[str, Any]], object]) -> None:
    """The other side: does the work that stdin asks for; what the libraries raise becomes one line on stderr."""
    quiet()
    collect_seldom()
    request = json.load(sys.stdin)
    try:
        work(request)
    except Exception as error:  # whatever the libraries raise is the answer
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _reason(code: int, errors: str) -> str:
    if code < 0:
        return f"its process was ended by signal {-code}, which may mean that memory ran out"
    said = errors.strip().splitlines()
    return said[-1][:500] if said else f"its process ended with {code}"
