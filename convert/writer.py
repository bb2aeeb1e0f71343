"""Writes one safetensors file, header first, payloads in any order, never a whole tensor in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from bitroute.backends.base import TensorSpec
from bitroute.convert.files import create, named, publish, write_all
from bitroute.convert.layout import build_header, total_bytes
from bitroute.errors import JobError, Problem


class ShardWriter:
    """Parts of a tensor are appended along its first dimension; the file gets its name only when complete.

    Threads may append to different tensors at the same time.

    Raises:
        JobError: a part has another dtype than planned, is one too many, or one is missing at the end.
    """

    def __init__(self, file: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self.file, self.specs = file, specs
        self.partial = file.with_name(file.name + ".part")
        header, self._cursors = build_header(specs, metadata)
        self._ends = {name: self._cursors[name] + spec.size_bytes for name, spec in specs.items()}
        self._file = create(self.partial)
        self._turn = Lock()
        self._write(memoryview(header), 0)

    def append(self, name: str, part: Tensor) -> int:
        """Bytes written."""
        data = part.detach().cpu().contiguous().reshape(-1)
        end = self._cursors[name] + data.nbytes
        if part.dtype != self.specs[name].dtype or end > self._ends[name]:
            raise JobError(
                Problem(
                    f"tensor {name!r} does not come as planned", str(self.file),
                    got=f"{data.nbytes} bytes of {part.dtype} at byte {self._cursors[name]}",
                    expected=f"{self.specs[name].dtype}, ending at byte {self._ends[name]}",
                )
            )  # fmt: skip
        self._write(memoryview(data.view(torch.uint8).numpy().data), self._cursors[name])
        self._cursors[name] = end
        return data.nbytes

    def close(self) -> None:
        """Complete, on the disk, and under its own name."""
        missing = [name for name, cursor in self._cursors.items() if cursor != self._ends[name]]
        if missing:
            self.abandon()
            raise JobError(Problem(f"tensors were never written: {', '.join(missing[:5])}", str(self.file)))
        with named(self.partial):
            os.fsync(self._file.fileno())
            self._file.close()
        publish(self.partial, self.file)

    def abandon(self) -> None:
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

    def _write(self, data: memoryview, offset: int) -> None:
        with self._turn, named(self.partial):
            self._file.seek(offset)
            write_all(self._file, data)


def is_written(file: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bool:
    """Whether a writer of the same specs finished this file: the planned header byte for byte, and the exact size."""
    header, _ = build_header(specs, metadata)
    size_bytes = len(header) + total_bytes(specs.values())
    if file.is_symlink() or not file.is_file() or file.stat().st_size != size_bytes:
        return False
    with open(file, "rb") as stream:
        return stream.read(len(header)) == header
