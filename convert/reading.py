"""Bytes from files: tensors by blocks of rows, JSON with a limit. Only regular files: a pipe would block for ever."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitroute.backends.base import TensorSpec
from bitroute.convert.files import advise
from bitroute.convert.layout import DerivedTensor, StoredTensor, check_regular
from bitroute.errors import Problem, SourceError

CONFIG_LIMIT_BYTES = 16_000_000  # an index of 100,000 tensors; more than that in brackets would take gigabytes
MAX_DEPTH = 64  # configs nest about five deep, and what copies and writes them calls itself for every level


def read_rows(tensor: StoredTensor, start: int, stop: int) -> Tensor:
    """Rows start..stop of a tensor seen as [out, everything else]; a fresh copy.

    Raises:
        SourceError: the file ends early or cannot be read.
    """
    if isinstance(tensor, DerivedTensor):
        return _derive(tensor)[start:stop].clone()
    with _opened(tensor) as stream:
        return _rows(stream, tensor, start, stop)


def read_tensor(tensor: StoredTensor) -> Tensor:
    """The whole tensor in its own shape; a fresh copy."""
    return read_rows(tensor, 0, tensor.spec.rows.shape[0]).reshape(tensor.spec.shape)


def read_into(tensor: StoredTensor, begin: int, buffer: memoryview) -> None:
    """Fills the buffer with the tensor's bytes from `begin` on; raises as `read_rows` does."""
    with _opened(tensor) as stream:
        _fill(stream, tensor, begin, buffer)


@contextmanager
def _opened(tensor: StoredTensor) -> Iterator[FileIO]:
    try:
        with FileIO(tensor.file) as stream:
            yield stream
    except OSError as error:
        raise SourceError(Problem(f"cannot read tensor {tensor.name!r}", str(tensor.file), got=str(error))) from error


def _rows(stream: FileIO, tensor: StoredTensor, start: int, stop: int) -> Tensor:
    columns, dtype = tensor.spec.rows.shape[1], tensor.spec.dtype
    rows = torch.empty(stop - start, columns, dtype=dtype)
    if rows.numel():
        buffer = memoryview(rows.view(torch.uint8).flatten().numpy().data)
        _fill(stream, tensor, start * columns * dtype.itemsize, buffer)
    return rows


def _fill(stream: FileIO, tensor: StoredTensor, begin: int, buffer: memoryview) -> None:
    stream.seek(tensor.offset + begin)
    while buffer:
        got = stream.readinto(buffer)
        if not got:
            raise SourceError(_ends_early(tensor))
        buffer = buffer[got:]


def _ends_early(tensor: StoredTensor) -> Problem:
    return Problem(
        f"the file ends inside tensor {tensor.name!r}", str(tensor.file),
        next_step="download or write this file again",
    )  # fmt: skip


def read_blocks(tensor: StoredTensor, bounds: Iterator[tuple[int, int]]) -> Iterator[Tensor]:
    """The rows of each range, while the disk reads ahead; what is derived is computed once for all of them."""
    if isinstance(tensor, DerivedTensor):
        whole = _derive(tensor)
        yield from (whole[start:stop].clone() for start, stop in bounds)
        return
    with _opened(tensor) as stream:
        advise(stream, "WILLNEED", tensor.offset, tensor.spec.size_bytes)
        yield from (_rows(stream, tensor, start, stop) for start, stop in bounds)


def forget(tensor: StoredTensor) -> None:
    """Leaves the memory in which the system keeps what was read to others."""
    for part in tensor.parts if isinstance(tensor, DerivedTensor) else (tensor,):
        with _opened(part) as stream:
            advise(stream, "DONTNEED", part.offset, part.spec.size_bytes)


def _derive(tensor: DerivedTensor) -> Tensor:
    """[out, everything else]. Raises SourceError where the parts make another tensor than was planned."""
    made = tensor.compute(*map(read_tensor, tensor.parts))
    found = TensorSpec(tuple(made.shape), made.dtype)
    if found != tensor.spec:
        what = f"tensor {tensor.name!r} comes out otherwise than planned"
        raise SourceError(Problem(what, str(tensor.file), got=str(found), expected=str(tensor.spec)))
    return made.reshape(tensor.spec.rows.shape)


def read_json(file: Path) -> dict[str, Any]:
    """Raises SourceError that names the file when it is missing, huge, deep, or not a JSON mapping."""
    try:
        check_regular(file)
        if file.stat().st_size > CONFIG_LIMIT_BYTES:
            raise SourceError(Problem("a JSON file of that size is not a config", str(file)))
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(Problem("the file is missing", str(file))) from None
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(Problem("cannot read the file as JSON", str(file), got=str(error))) from error
    if not isinstance(content, dict):
        raise SourceError(Problem("not a JSON mapping", str(file), got=type(content).__name__))
    if _is_deep(content):
        raise SourceError(
            Problem("a JSON file of that depth is not a config", str(file), expected=f"{MAX_DEPTH} levels")
        )
    return content


def _is_deep(content: object) -> bool:
    level = [content]
    for _ in range(MAX_DEPTH):
        lists = [value for value in level if isinstance(value, list)]
        dicts = [value.values() for value in level if isinstance(value, dict)]
        level = [child for values in (*lists, *dicts) for child in values]
    return bool(level)
