"""Runs a module of bitroute.eval in a process of its own: a crash of a kernel stays there, and so does its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bitroute.convert.noise import quiet
from bitroute.errors import JobError, Problem


def run_apart(module: str, request: Mapping[str, Any], failed: str, where: Path) -> str:
    """The last line that the module printed, when it was given the request as JSON on stdin.

    Raises:
        JobError: `failed`, with what the process said last.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", module], capture_output=True, text=True, check=False, input=json.dumps(request)
    )
    if done.returncode:
        raise JobError(Problem(failed, str(where), got=_reason(done)))
    return (done.stdout.strip().splitlines() or [""])[-1]


def answer(work: Callable[[dict[str, Any]], object]) -> None:
    """The other side: does the work that stdin asks for; what the libraries raise becomes one line on stderr."""
    quiet()
    request = json.load(sys.stdin)
    try:
        work(request)
    except Exception as error:  # whatever the libraries raise is the answer
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"its process was ended by signal {-done.returncode}, which may mean that memory ran out"
    said = done.stderr.strip().splitlines()
    return said[-1][:500] if said else f"its process ended with {done.returncode}"
