"""What was measured, as lines of JSON in the work folder, and the machine that did it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

SIZES: Mapping[str, tuple[int, int]] = {"0.69": (1, 2), "1.31": (2, 4), "2.56": (4, 8)}  # 10^9 parameters → blocks
PEER_SIZE = "1.31"
MACHINE = "machine.json"
PACKAGES = ("torch", "diffusers", "torchao", "bitsandbytes", "optimum-quanto")


@dataclass(frozen=True)
class Run:
    size: str
    format: str
    candidate: str
    fsync: bool
    round: int


@dataclass(frozen=True)
class Summary:
    """Of all rounds: medians of the times, the largest memory. Seconds and bytes."""

    runs: int
    seconds: float
    cpu: float
    anon: int
    rss: int
    written: int


class Results:
    def __init__(self, work: Path) -> None:
        self.work, self._file = work, work / "results.jsonl"
        lines = self._file.read_text("utf-8").splitlines() if self._file.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, run: Run, found: Mapping[str, Any]) -> None:
        self.rows.append({**asdict(run), **found})
        with open(self._file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(self.rows[-1]) + "\n")

    def has(self, run: Run) -> bool:
        return any(asdict(run).items() <= row.items() for row in self.rows)

    def slowest(self, run: Run) -> float:
        """Seconds, of all rounds of this run."""
        rows = self.of(run.size, run.format, run.candidate, run.fsync)
        return max((row.get("seconds", 0.0) for row in rows), default=0.0)

    def of(self, size: str, format_name: str, candidate: str, fsync: bool) -> list[dict[str, Any]]:
        asked = {"size": size, "format": format_name, "candidate": candidate, "fsync": fsync}
        return [row for row in self.rows if asked.items() <= row.items()]

    def conversion(self, size: str, format_name: str, candidate: str, fsync: bool) -> Summary | str | None:
        """The error in words where it failed; None where it was not measured."""
        return _summary(self.of(size, format_name, candidate, fsync))

    def loading(self, size: str, format_name: str, candidate: str) -> Summary | str | None:
        rows = self.of(size, format_name, candidate, False)
        return _summary([row["load"] for row in rows if "load" in row])


def _summary(rows: Sequence[Mapping[str, Any]]) -> Summary | str | None:
    good = [row for row in rows if "error" not in row]
    if not good:
        return str(rows[0]["error"]) if rows else None
    return Summary(
        len(good),
        *(median(row[key] for row in good) for key in ("seconds", "cpu")),
        *(max(row.get(key, 0) for row in good) for key in ("anon", "rss", "written")),
    )


def describe_machine(work: Path, command: Sequence[str], more: Mapping[str, str]) -> None:
    """more: versions of packages of another environment. Commands of earlier runs into the same folder are kept."""
    file = work / MACHINE
    earlier = json.loads(file.read_text("utf-8"))["commands"] if file.exists() else []
    said = " ".join(["python", "benchmarks/speed.py", *command[1:]])
    words = {
        "date": time.strftime("%Y-%m-%d"), "cpu": _cpu(), "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES} | dict(more),
        "compiler": _compiler(), "commands": [*(one for one in earlier if one != said), said],
    }  # fmt: skip
    file.write_text(json.dumps(words, indent=1), "utf-8")


def _compiler() -> str:
    """That of bitroute's rounding, or none."""
    found = shutil.which("cc")
    if not found:
        return "no C compiler"
    return subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout.partition("\n")[0]


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
