"""Time and memory of converting and loading: bitroute, the other libraries and the copying of the bytes.

python benchmarks/speed.py [WORK]      writes docs/benchmarks.md; some 40 minutes on two cores
Every finished measurement is a line of WORK/results.jsonl (build/speed); what is there is not measured again, so that
an interrupted run goes on, and --formats, --sizes and --peers make it in pieces. --full adds FLUX.1-dev's own size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from formats import BF16, BITROUTE, COPYING, FORMATS, SDNQ, UNCOMPILED
from full_size import measure_full_size
from processes import SDNQ_VERSION, checkpoint, environment, measured, sdnq_python
from results import PEER_SIZE, SIZES, Results, Run, describe_machine
from speed_page import COMPILED, FORWARD, write_page

PEERS = sorted({peer for one in FORMATS.values() for peer in one.peers})
ROUNDS = 3
TOUCH = "bytearray(4 * 2**30)[::4096] = bytes(2**20)"  # what the hungriest holds beside the files
SLOW_SECONDS = 60  # such a conversion is made once
WORK = Path("build/speed")
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=WORK, help="folder of the models, gigabytes, and results")
    parser.add_argument("--formats", nargs="*", choices=list(FORMATS), default=list(FORMATS), help="default: all")
    parser.add_argument(
        "--sizes", nargs="*", choices=list(SIZES), default=list(SIZES), help="billions of parameters; default: all"
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="default: all")
    parser.add_argument(
        "--peer-size", choices=list(SIZES), default=PEER_SIZE, help=f"what all are compared at; default: {PEER_SIZE}"
    )
    parser.add_argument("--grow-peers", action="store_true", help="measure them at the other sizes too, once")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of every measurement; default: {ROUNDS}")
    parser.add_argument("--forward", action="store_true", help="run forward.py too")
    parser.add_argument("--compiled", action="store_true", help="run compiled.py too: a minute")
    parser.add_argument("--full", action="store_true", help="convert 11.9 billion parameters too: 40 GB of disk")
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page of what is there")
    parser.add_argument(
        "--page", type=Path, help="to write; default: docs/benchmarks.md, or benchmarks.md in a WORK of your own"
    )
    said = parser.parse_args()
    if said.peers and not said.grow_peers and said.peer_size not in said.sizes:
        parser.error(f"--peers are measured at --peer-size {said.peer_size}, which --sizes leaves out")
    work = said.work.absolute()
    page = said.page or (PAGE if said.work == WORK else work / PAGE.name)
    work.mkdir(parents=True, exist_ok=True)
    results = Results(work)
    if not said.page_only:
        with_sdnq = said.peers is None or SDNQ in said.peers
        describe_machine(work, sys.argv, {SDNQ: SDNQ_VERSION} if with_sdnq else {})
        measure_all(work, results, list(runs(said)))
        if said.forward:
            source = checkpoint(work / f"flux-{said.peer_size}", SIZES[said.peer_size])
            tabulate(work / FORWARD, "forward.py", str(source))
        if said.compiled:
            tabulate(work / COMPILED, "compiled.py")
        if said.full:
            measure_full_size(work)
    write_page(results, page, said.peer_size)
    print(f"written: {page}")


def runs(said: argparse.Namespace) -> Iterator[Run]:
    """Round after round, in each all candidates of a format in turn: what else the machine does meets them alike."""
    for number in range(said.rounds):
        for size in said.sizes:
            compared = size == said.peer_size
            if compared:
                yield Run(size, BF16, BF16, False, number)
            for name in said.formats:
                sides = (True, False) if compared else (True,)
                own = [(one, fsync) for fsync in sides for one in (COPYING, BITROUTE)]
                own += [(UNCOMPILED, False)] if compared else []
                peers = [peer for peer in FORMATS[name].peers if said.peers is None or peer in said.peers]
                if not compared and (number or not said.grow_peers):
                    peers = []
                for candidate, fsync in [*own, *((peer, False) for peer in peers)]:
                    yield Run(size, name, candidate, fsync, number)


def measure_all(work: Path, results: Results, planned: Sequence[Run]) -> None:
    for run in planned:
        if results.has(run) or (run.round and results.slowest(run) > SLOW_SECONDS):
            continue
        print(*(f"{key} {value}" for key, value in vars(run).items()), flush=True)
        found = measure(work, run)
        results.add(run, found)
        print(json.dumps(found), flush=True)


def measure(work: Path, run: Run) -> dict[str, Any]:
    source, out = checkpoint(work / f"flux-{run.size}", SIZES[run.size]), work / "out"
    python = sdnq_python(work) if run.candidate == SDNQ else sys.executable
    settle(source)
    if run.candidate == BF16:
        return {"load": measured(python, "load", BF16, source)}
    remove(out)
    flags = [] if run.fsync else ["--no-fsync"]
    found = measured(python, "convert", run.format, run.candidate, source, out, *flags)
    if "error" not in found and not run.fsync and run.candidate not in (COPYING, UNCOMPILED):
        settle(out)
        found["load"] = measured(python, "load", run.candidate, out)
    remove(out)
    return found


def tabulate(file: Path, script: str, *words: str) -> None:
    """Writes the table that another script prints; nothing is done where the file is."""
    if not file.exists():
        command = [sys.executable, str(Path(__file__).with_name(script)), *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment())
        file.write_text(done.stdout, "utf-8")


def settle(folder: Path) -> None:
    """All that was written is on the disk, and the weights are in the page cache as reading them brings them there.

    What its writer left there is in pieces of its own sizes: loading of those took longer. And the memory that the
    last process freed may have gone back to the host of a virtual machine: touched here, or the next one waits for it.
    """
    os.sync()
    buffer = bytearray(2**20)
    for file in folder.glob("*.safetensors"):
        with open(file, "rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while stream.readinto(buffer):
                pass
    subprocess.run([sys.executable, "-c", TOUCH], check=True)  # here it would count in the peak of every child


def remove(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.with_suffix(".yaml").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
