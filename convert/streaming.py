"""Weights on their way: a block of rows of each worker in memory, reading, arithmetic and writing at the same time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock

import psutil
import torch
from torch import Tensor

from bitroute.convert.entry import Entry
from bitroute.convert.layout import total_bytes
from bitroute.convert.reading import forget, read_blocks
from bitroute.convert.statistics import read_statistics
from bitroute.convert.workers import aside, check_stop, run_all
from bitroute.convert.writer import ShardWriter
from bitroute.errors import BackendError, JobError, Problem

SMALL_BYTES = 4096  # of a part of an output
Progress = Callable[[int, str], None]  # source bytes done since the last call, what was worked on; from any thread


class Shard:
    """A file to write: what becomes of which tensors, and under which names: output suffix → stored name.

    The writer, with the header of the file, is there from the first of its tensors to the last.
    """

    def __init__(
        self, file: Path, entries: Sequence[Entry], names: Sequence[Mapping[str, str]], make: Callable[[], ShardWriter]
    ) -> None:
        self.file, self.entries, self.names = file, entries, names
        self._make, self._turn = make, Lock()
        self._writer: ShardWriter | None = None

    @property
    def source_bytes(self) -> int:
        return total_bytes(entry.source.spec for entry in self.entries)

    def writer(self) -> ShardWriter:
        with self._turn:
            self._writer = self._writer or self._make()
            return self._writer

    def finish(self) -> str:
        """The SHA-256 of the file, which has its name."""
        writer = self.writer()
        digest = writer.sha256()
        writer.close()
        self._writer = None
        return digest

    def abandon(self) -> None:
        if self._writer:
            self._writer.abandon()


def write_shards(shards: Sequence[Shard], device: torch.device, report: Progress) -> dict[Path, str]:
    """File → its SHA-256. Whoever is done with a tensor hashes what is whole; beside them complete files are finished.

    Raises:
        JobError: a weight is not finite, or a backend cannot hold it.
        SourceError: a source is damaged. OSError: a file cannot be written.
    """
    hashes: dict[Path, str] = {}
    passing = sum(shard.source_bytes for shard in shards) > psutil.virtual_memory().total // 2

    def finish(shard: Shard) -> None:
        hashes[shard.file] = shard.finish()

    def write(shard: Shard, entry: Entry, names: Mapping[str, str]) -> None:
        writer = shard.writer()
        complete = [writer.append(name, part) for name, part in _parts(entry, names, device, report)]
        if any(complete):
            aside(partial(finish, shard))
        else:
            writer.keep_up()
        if passing:
            forget(entry.source)

    try:
        run_all(
            partial(write, shard, *pair) for shard in shards for pair in zip(shard.entries, shard.names, strict=True)
        )
    finally:
        for shard in shards:
            shard.abandon()
    for shard in shards:
        if shard.file not in hashes:  # no byte of a tensor is in it
            finish(shard)
    return hashes


def _parts(
    entry: Entry, names: Mapping[str, str], device: torch.device, report: Progress
) -> Iterator[tuple[str, Tensor]]:
    """Stored name and rows of it, in order. Raises JobError where the backend cannot hold the values."""
    try:
        statistics = read_statistics(entry.statistics)
        survey = entry.backend.survey(_blocks(entry, device), entry.weight, statistics)
        yield from ((names[suffix], tensor) for suffix, tensor in survey.outputs.items())
        bounds = entry.backend.block_bounds(entry.source.spec.rows)
        gathered = _Gathered(entry)
        for (start, stop), rows in zip(bounds, _blocks(entry, device), strict=True):
            for suffix, part in entry.backend.encode(rows, survey.of_rows(start, stop), statistics).items():
                if not gathered.takes(suffix, part):
                    yield names[suffix], part
            report(rows.numel() * entry.source.spec.dtype.itemsize, entry.layer or entry.name)
        pending = {suffix: gathered.whole.pop(suffix) for suffix in entry.backend.pending}
        outputs = {**gathered.whole, **entry.backend.conclude(pending, entry.weight)}
        yield from ((names[suffix], tensor) for suffix, tensor in outputs.items())
    except BackendError as error:
        raise JobError([replace(problem, where=entry.name) for problem in error.problems]) from error


class _Gathered:
    """What is pending, and outputs of a few bytes a row, such as their scales: put together, one write for each."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.whole: dict[str, Tensor] = {}
        self._ends: defaultdict[str, int] = defaultdict(int)

    def takes(self, suffix: str, part: Tensor) -> bool:
        """False for the parts of an output, from the first on, that are worth a write each."""
        begin = self._ends[suffix]
        self._ends[suffix] = end = begin + part.numel()
        if begin == 0 and (part.nbytes < SMALL_BYTES or suffix in self.entry.backend.pending):
            self.whole[suffix] = torch.empty(self.entry.outputs[suffix].numel, dtype=part.dtype)
        if suffix in self.whole:
            self.whole[suffix][begin:end] = part.flatten()
        return suffix in self.whole


def _blocks(entry: Entry, device: torch.device) -> Iterator[Tensor]:
    """Raises JobError at the first block of a weight to quantize that holds NaN or infinity."""
    for rows in read_blocks(entry.source, entry.backend.block_bounds(entry.source.spec.rows)):
        check_stop()
        if entry.quantized and not _finite(rows):
            bad = int((~rows.isfinite()).sum())
            raise JobError(
                Problem(
                    f"the weight of layer {entry.layer!r} is not finite", str(entry.source.file),
                    got=f"{bad} NaN or infinite values in one block of rows",
                    next_step="the source is damaged: download it again, or keep this layer to copy it as it is",
                )
            )  # fmt: skip
        yield entry.backend.arithmetic(rows).to(device)


def _finite(rows: Tensor) -> bool:
    """A sum is one pass without temporaries; only one that is not finite needs the slow look."""
    return math.isfinite(rows.sum().item()) or bool(rows.isfinite().all())
