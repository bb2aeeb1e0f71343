"""Writes one safetensors file, header first, payloads in any order, never a whole tensor in memory."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from bitroute.backends.base import TensorSpec
from bitroute.convert.files import advise, create, named, publish, read_chunks, reserve, write_all
from bitroute.convert.layout import build_header, total_bytes
from bitroute.errors import JobError, Problem


class ShardWriter:
    """Parts of a tensor are appended along its first dimension; the file gets its name only when complete.

    Threads may append to different tensors at the same time. There is no file before the first of them does.

    Raises:
        JobError: a part has another dtype than planned, is one too many, or one is missing at the end.
    """

    def __init__(self, file: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self.file, self.specs = file, specs
        self.partial = file.with_name(file.name + ".part")
        self._header, self._begins = build_header(specs, metadata)
        self._ends = {name: self._begins[name] + spec.size_bytes for name, spec in specs.items()}
        self._cursors = dict(self._begins)
        self._left_bytes = total_bytes(specs.values())
        self._unread = deque(sorted(self._begins, key=self._begins.__getitem__))  # in the order of the file
        self._digest = hashlib.sha256(self._header)
        self._turn, self._hashing = Lock(), Lock()
        self._file: FileIO | None = None

    def append(self, name: str, part: Tensor) -> bool:
        """Whether the file is complete with this part, and to be closed."""
        data = part.detach().cpu().contiguous().reshape(-1)
        begin, end = self._cursors[name], self._cursors[name] + data.nbytes
        if part.dtype != self.specs[name].dtype or end > self._ends[name]:
            raise JobError(
                Problem(
                    f"tensor {name!r} does not come as planned", str(self.file),
                    got=f"{data.nbytes} bytes of {part.dtype} at byte {begin}",
                    expected=f"{self.specs[name].dtype}, ending at byte {self._ends[name]}",
                )
            )  # fmt: skip
        if not data.nbytes:
            return False
        with self._turn, named(self.partial):
            stream = self._opened()
            stream.seek(begin)
            write_all(stream, memoryview(data.view(torch.uint8).numpy().data))
            self._cursors[name] = end  # only now: `keep_up` reads what is complete
            self._left_bytes -= data.nbytes
            return not self._left_bytes

    def keep_up(self) -> None:
        """Hashes what is whole and has the disk begin to write it, unless another thread is at it."""
        if self._hashing.acquire(blocking=False):
            try:
                self._hash_whole()
            finally:
                self._hashing.release()

    def sha256(self) -> str:
        """Of the whole file, once all its tensors are there."""
        with self._hashing:
            self._hash_whole()
        return self._digest.hexdigest()

    def _hash_whole(self) -> None:
        """The tensors up to the first, in the order of the file, that is not whole."""
        while self._unread and self._cursors[self._unread[0]] == self._ends[self._unread[0]]:
            name = self._unread.popleft()
            begin, size_bytes = self._begins[name], self._ends[name] - self._begins[name]
            if not size_bytes:  # there may be no file yet
                continue
            for chunk in read_chunks(self.partial, begin, size_bytes):
                self._digest.update(chunk)
            if self._file:
                advise(self._file, "DONTNEED", begin, size_bytes)

    def close(self) -> None:
        """Complete, on the disk, and under its own name."""
        missing = [name for name, cursor in self._cursors.items() if cursor != self._ends[name]]
        if missing:
            self.abandon()
            raise JobError(Problem(f"tensors were never written: {', '.join(missing[:5])}", str(self.file)))
        with named(self.partial):
            stream = self._opened()
            os.fsync(stream.fileno())
            stream.close()
        publish(self.partial, self.file)

    def abandon(self) -> None:
        if self._file:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    def _opened(self) -> FileIO:
        if self._file is None:
            self._file = create(self.partial)
            reserve(self._file, len(self._header) + self._left_bytes)
            write_all(self._file, self._header)
        return self._file


def is_written(file: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bool:
    """Whether a writer of the same specs finished this file: the planned header byte for byte, and the exact size."""
    header, _ = build_header(specs, metadata)
    size_bytes = len(header) + total_bytes(specs.values())
    if file.is_symlink() or not file.is_file() or file.stat().st_size != size_bytes:
        return False
    with open(file, "rb") as stream:
        return stream.read(len(header)) == header
