"""Everything that is measured or made runs in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memory import Watcher

HERE = Path(__file__).parent
TIMEOUT_SECONDS = 600
SDNQ_VERSION = "0.2.8"


@dataclass(frozen=True)
class Observed:
    """A command from its start to its end. Seconds and bytes; log: what it printed."""

    command: str
    seconds: float
    cpu: float
    anon: int
    rss: int
    log: str


def measured(python: str, *arguments: object) -> dict[str, Any]:
    """What measured.py prints, or the error that ended it."""
    command = [python, str(HERE / "measured.py"), *map(str, arguments)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS, env=environment()
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {TIMEOUT_SECONDS} s"}
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1:] if done.returncode > 0 else []
        return {"error": words[0][:300] if words else f"ended with {done.returncode}"}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def observed(work: Path, *arguments: str) -> dict[str, Any]:
    """An `Observed` of the command `quantize`, which ends this program where it fails.

    Its output goes to a file: a full pipe would stop it.
    """
    command, log = " ".join(["quantize", *arguments]), work / "log.txt"
    start = time.perf_counter()
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "bitroute", *arguments],
            cwd=work, stdout=stream, stderr=subprocess.STDOUT, env=environment(),
        )  # fmt: skip
    watcher = Watcher(process.pid)
    watcher.start()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its number stays its own until the watcher has stopped
    seconds, anon = time.perf_counter() - start, watcher.stop()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # it was not Popen that waited
    words = log.read_text("utf-8", errors="replace")
    log.unlink()
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}:\n{words}")
    return asdict(Observed(command, seconds, usage.ru_utime + usage.ru_stime, anon, 1024 * usage.ru_maxrss, words))


def anonymous_with_torch() -> int:
    """Bytes of a process that has imported torch and nothing else."""
    program = "import os, torch; from memory import memory; print(memory(os.getpid(), 'RssAnon'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, check=True)
    return int(done.stdout)


def environment() -> dict[str, str]:
    """The threads that a library chooses itself, and no network."""
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {"HF_HUB_OFFLINE": "1"}


def checkpoint(folder: Path, blocks: Sequence[int]) -> Path:
    """The synthetic model, made if it is not there. blocks: double and single ones."""
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        double, single = map(str, blocks)
        command = [sys.executable, str(HERE / "flux.py"), str(folder), "--double", double, "--single", single]
        subprocess.run(command, check=True)
    return folder


def sdnq_python(work: Path) -> str:
    """Of an environment of its own: it is never a requirement of bitroute."""
    folder = work / "sdnq-venv"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        constraints = str(HERE.parent / "constraints.txt")
        packages = [f"sdnq=={SDNQ_VERSION}", "torch", "diffusers", "transformers", "accelerate"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-c", constraints, *packages], check=True)
        done.touch()
    return str(python)
