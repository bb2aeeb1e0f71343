"""docs/benchmarks.md from what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from formats import BF16, BITROUTE, BITSANDBYTES, COPYING, FORMATS, SDNQ, UNCOMPILED, Format
from full_size import FILE as FULL_SIZE
from results import MACHINE, SIZES, Results, Summary

GIB = 2**30
UNKNOWN = "not measured"
TEXT = """\
# Time and memory

<!-- written by: python benchmarks/speed.py -->

{machine}

    {commands}

The model is FluxTransformer2DModel with the widths of FLUX.1-dev and fewer blocks, its weights Gaussian numbers in
bf16, in shards of 500 MB, in the page cache before each run. Every linear layer is quantized, on all sides: here with
`keep: none`, in {sdnq} with `add_skip_keys=False`. {bitsandbytes} runs on its own CPU kernels, with diffusers' demand
for a GPU lifted. A library's run is `from_pretrained` with its quantization and `save_pretrained`; bitroute's is its
plan and its job; copying reads all and writes as many bytes as the format has.

bitroute also takes the SHA-256 of what it writes, which the others do not. It rounds by C code that it compiles once
for each user and machine, in a tenth of a second; its row without a compiler is the eager code, which stores the same
bytes. Without fsync nobody waits for the disk, and bitroute does not have it begin early either. Each run is a
process of its own, with as many threads as the library takes; the clocks leave out the imports. All candidates of a
format run in turn, round after round: times are medians, memory is the largest of all rounds, sampled every 5 ms; what
took over a minute ran once. On a machine with nothing else to do the same run varies by a tenth.
Anonymous memory is what comes on top of `import torch`; resident memory is all of the process, and counts the mapped
files too, which the system can take back.

## In short

Times of {size} billion parameters as ratios. With fsync: bitroute beside the copying of the bytes. Without, as
`save_pretrained` does not wait for the disk: the fastest other library beside bitroute.

{short}

## Converting {size} billion parameters

CPU seconds and memory are those of the run without fsync.

{converting}

## Loading

`from_pretrained`, then every byte is read. Files lie in the page cache.

{loading}

## Growth

Copying and bitroute with fsync, the others without. Where copying takes more CPU time per byte than at the other sizes,
it waited for memory that the host of this virtual machine had taken back, and the ratio says little.

{growth}
{forward}{compiled}{full}"""
FORWARD, COMPILED = "forward.md", "compiled.md"
RUNNING = """
## Running

A forward from bitroute's own container beside bf16 on the CPU, at {size} billion parameters, by `python
benchmarks/forward.py CHECKPOINT`: ratios of the least times, and of the CPU seconds. 1024+512 tokens are a picture of
512 × 512 and its prompt; with few tokens decoding the weights is most of the work. Memory is the anonymous peak of one
forward of the larger size.

{table}
"""
COMPILING = """
## Compiled encoders

The encoders are torch on blocks of rows. What torch does number by number or in ten passes, rounding to small floats
and to tables, is one pass of C, compiled in 0.1 s when a job first needs it and kept for the next; without a compiler
the eager code stores the same bits. torch.compile does not pay: `python benchmarks/compiled.py` has inductor compile
each encoder as it stands, for any number of rows and columns, where torch.export can trace it. It makes no vectors of
blocks of 16 or 32 nor of small integers, takes floats as integers by way of memory, and keeps bf16 numbers in float32
between operations, which changes the scales of rows; its code keeps Python from the other workers while it runs.

{table}
"""
FULL = """
## FLUX.1-dev's own size

11.9 billion parameters, {read} GB in bf16, once, to float8 by the command itself: the time of the whole process, with
its imports. The recipe says `transformer: {{backend: float8}}`, so the profile's layers stay in bf16. Before it the
bytes were copied (read all, write half, fsync), after it the result was loaded.

{table}

{log}
"""


def write_page(results: Results, page: Path, size: str) -> None:
    """size: the one at which all were compared."""
    machine = json.loads((results.work / MACHINE).read_text("utf-8"))
    forward, compiled, full = (results.work / name for name in (FORWARD, COMPILED, FULL_SIZE))
    text = TEXT.format(
        machine=_machine(machine), commands="\n    ".join(machine["commands"]), size=size,
        sdnq=SDNQ, bitsandbytes=BITSANDBYTES, short=short(results, size), converting=converting(results, size),
        loading=loading(results, size), growth=growth(results),
        forward=RUNNING.format(size=size, table=forward.read_text("utf-8").strip()) if forward.exists() else "",
        compiled=COMPILING.format(table=compiled.read_text("utf-8").strip()) if compiled.exists() else "",
        full=full_size(json.loads(full.read_text("utf-8"))) if full.exists() else "",
    )  # fmt: skip
    page.write_text(text, "utf-8")


def short(results: Results, size: str) -> str:
    """What the other tables say of bitroute, as ratios of their medians."""
    lines = []
    for name in _measured(results, size):
        copied, own = (results.conversion(size, name, one, True) for one in (COPYING, BITROUTE))
        unsynced, uncompiled = (results.conversion(size, name, one, False) for one in (BITROUTE, UNCOMPILED))
        rival, fastest = _fastest(results, size, name)
        lines.append([name, _ratio(own, copied), rival, _ratio(fastest, unsynced), _ratio(fastest, uncompiled)])
    head = ["format", "bitroute / copying", "fastest other", "other / bitroute", "other / bitroute, no compiler"]
    return _table(head, lines)


def converting(results: Results, size: str) -> str:
    head = ["s, fsync", "s", "CPU s", "anonymous GiB", "resident GiB", "written MB", "rounds"]
    parts = []
    for name in _measured(results, size):
        form = FORMATS[name]
        lines = [[one, *_conversion(results, size, name, one)] for one in _candidates(form)]
        parts.append(f"{name}: {form.about}\n\n{_table([name, *head], lines)}")
    return "\n\n".join(parts)


def loading(results: Results, size: str) -> str:
    bf16 = results.loading(size, BF16, BF16)
    rows = [(BF16, "", bf16)] + [
        (name, one, results.loading(size, name, one))
        for name, form in FORMATS.items() for one in _candidates(form) if one != COPYING
    ]  # fmt: skip
    lines = [[name, one, *_loading(found, bf16)] for name, one, found in rows if found is not None]
    return _table(["format", "written by", "s", "s / bf16", "CPU s", "anonymous GiB", "resident GiB"], lines)


def growth(results: Results) -> str:
    head = ["format", "", "10⁹ parameters", "s", "s per GB read", "× copying", "CPU s", "anonymous GiB", "resident GiB"]
    lines = []
    for name, form in FORMATS.items():
        for candidate in _candidates(form):
            for size in SIZES:
                copied = results.conversion(size, name, COPYING, True)
                found = results.conversion(size, name, candidate, fsync=candidate not in form.peers)
                if isinstance(found, Summary):
                    ratio = _ratio(found, copied) if candidate == BITROUTE else ""
                    per_byte = f"{found.seconds / (2 * float(size)):.2f}"  # bf16
                    times = [f"{found.seconds:.2f}", per_byte, ratio, f"{found.cpu:.2f}"]
                    lines.append([name, candidate, size, *times, _gib(found.anon), _gib(found.rss)])
    return _table(head, lines)


def full_size(found: Mapping[str, Any]) -> str:
    run = found["conversion"]
    own = {**run, "anon": run["anon"] - found["base"]}
    rows = {"copying": found["copying"], f"`{run['command']}`": own, "loading": found["loading"]}
    lines = [[name, *_once(one)] for name, one in rows.items()]
    table = _table(["", "s", "CPU s", "anonymous GiB", "resident GiB"], lines)
    log = _indented(f"$ {run['command']}\n{run['log']}")
    return FULL.format(read=f"{found['read'] / 1e9:.1f}", table=table, log=log)


def _machine(said: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in said["packages"].items())
    return (
        f"Made on {said['date']} on {said['cores']} cores ({said['cpu']}) with {said['memory'] / GIB:.0f} GiB, on the "
        f"CPU alone: Python {said['python']},\n{packages}, {said['compiler']}."
    )


def _measured(results: Results, size: str) -> list[str]:
    """The formats of which there is something at this size."""
    return [
        name
        for name, form in FORMATS.items()
        if any(results.conversion(size, name, one, False) for one in _candidates(form))
    ]


def _candidates(form: Format) -> Iterator[str]:
    yield from (COPYING, BITROUTE, UNCOMPILED, *form.peers)


def _fastest(results: Results, size: str, name: str) -> tuple[str, Summary | None]:
    found = {peer: results.conversion(size, name, peer, False) for peer in FORMATS[name].peers}
    good = {peer: one for peer, one in found.items() if isinstance(one, Summary)}
    best = min(good, key=lambda peer: good[peer].seconds, default="")
    return (best, good[best]) if best else (UNKNOWN, None)


def _conversion(results: Results, size: str, name: str, candidate: str) -> list[str]:
    synced, found = (results.conversion(size, name, candidate, fsync) for fsync in (True, False))
    if found is None:
        return [UNKNOWN, *[""] * 6]
    if isinstance(found, str):
        return [f"failed: {found}", *[""] * 6]
    seconds = f"{synced.seconds:.2f}" if isinstance(synced, Summary) else ""
    times = [seconds, f"{found.seconds:.2f}", f"{found.cpu:.2f}"]
    return [*times, _gib(found.anon), _gib(found.rss), f"{found.written / 1e6:.0f}", str(found.runs)]


def _loading(found: Summary | str, bf16: Summary | str | None) -> list[str]:
    if isinstance(found, str):
        return [f"failed: {found}", *[""] * 4]
    return [f"{found.seconds:.2f}", _ratio(found, bf16), f"{found.cpu:.2f}", _gib(found.anon), _gib(found.rss)]


def _once(one: Mapping[str, Any]) -> list[str]:
    if "error" in one:
        return [f"failed: {one['error']}", "", "", ""]
    return [f"{one['seconds']:.1f}", f"{one['cpu']:.1f}", _gib(one["anon"]), _gib(one["rss"])]


def _ratio(one: Summary | str | None, other: Summary | str | None) -> str:
    if isinstance(one, Summary) and isinstance(other, Summary):
        return f"{one.seconds / other.seconds:.2f}"
    return UNKNOWN


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f}"


def _table(head: list[str], lines: Iterable[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    if len(rows) == 2:
        return "Not measured."
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
