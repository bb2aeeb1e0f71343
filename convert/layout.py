"""The safetensors file layout: a header that is read without the data, and one that is built before it.

Eight bytes of length, a JSON header, the payloads without gaps (github.com/huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bitroute.backends.base import CODES, TensorSpec
from bitroute.convert.document import shown
from bitroute.errors import Problem, SourceError

ALIGNMENT_BYTES = 64
MAX_DIMENSIONS = 16
MAX_NAME_LENGTH = 500
HEADER_LIMIT_BYTES = 16_000_000  # about 100,000 tensors; the library's 100 MB of `[],` would take 2 GB of memory
METADATA = "__metadata__"
DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where its bytes are."""

    name: str
    spec: TensorSpec
    file: Path
    offset: int  # of the first payload byte, from the start of the file


@dataclass(frozen=True)
class DerivedTensor(StoredTensor):
    """A tensor that no file holds as it is: computed from stored ones, anew each time it is read.

    file, offset: of the first part, for errors. compute: the parts, whole and in order → a tensor of `spec`.
    """

    parts: tuple[StoredTensor, ...]
    compute: Callable[..., Tensor]


@dataclass(frozen=True)
class Header:
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """The header of one file, checked against the file's size.

    Raises:
        SourceError: not a safetensors file, truncated, or a header that contradicts itself.
    """
    try:
        check_regular(file)
        size_bytes = os.path.getsize(file)
        with open(file, "rb") as stream:
            start = stream.read(8)
            if len(start) < 8:
                raise _broken(file, f"a file of {size_bytes} bytes")
            length = struct.unpack("<Q", start)[0]
            if not 0 < length <= min(HEADER_LIMIT_BYTES, size_bytes - 8):
                raise _broken(file, f"a header of {length} bytes in a file of {size_bytes} bytes")
            entries = json.loads(stream.read(length).decode(), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise SourceError(Problem("cannot read the file", str(file), got=str(error))) from error
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python converts
        raise _broken(file, f"a header that is not plain JSON: {error}") from error
    return _parse(file, entries, 8 + length, size_bytes)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError where a name stands twice: every reader would choose for itself which one it takes."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{shown(twice)} stands twice")
    return content


def check_regular(file: Path) -> None:
    """Raises SourceError for a pipe or a device, which would be read for ever; OSError where nothing is there."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise SourceError(Problem("not a regular file", str(file)))


def build_header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the payloads, and the absolute offset of each tensor.

    Payloads whose size is a multiple of 64 stand first, so each starts on a 64-byte boundary; the others follow
    by falling power of two, so a payload divisible by 16 starts on a multiple of 16.
    """
    order = sorted(specs, key=lambda name: -_divisor(specs[name].size_bytes))
    header: dict[str, Any] = {METADATA: dict(metadata)}
    ends = [0]
    for name in order:
        ends.append(ends[-1] + specs[name].size_bytes)
        header[name] = {
            "dtype": CODES[specs[name].dtype],
            "shape": list(specs[name].shape),
            "data_offsets": ends[-2:],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {n: start + ends[i] for i, n in enumerate(order)}


def total_bytes(specs: Iterable[TensorSpec]) -> int:
    return sum(spec.size_bytes for spec in specs)


def stored_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Of the files' parts that these are or are derived from, each counted once."""
    left, found = list(tensors), dict[tuple[Path, int], int]()
    while left:
        tensor = left.pop()
        if isinstance(tensor, DerivedTensor):
            left += tensor.parts
        else:
            found[tensor.file, tensor.offset] = max(tensor.spec.size_bytes, found.get((tensor.file, tensor.offset), 0))
    return sum(found.values())


def _divisor(size_bytes: int) -> int:
    """The largest power of two up to 64 that divides the size."""
    return min(size_bytes & -size_bytes, ALIGNMENT_BYTES) if size_bytes else ALIGNMENT_BYTES


def _parse(file: Path, entries: Any, start: int, size_bytes: int) -> Header:
    if not isinstance(entries, dict):
        raise _broken(file, "a header that is not a mapping")
    metadata = entries.pop(METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(map(_is_text, (*metadata, *metadata.values()))):
        raise _broken(file, "a __metadata__ that does not map names to text")
    tensors = {name: _entry(file, name, entry, start) for name, entry in entries.items()}
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.spec.size_bytes)):
        if tensor.offset != end:
            raise _broken(file, f"tensor {tensor.name!r} at byte {tensor.offset} where {end} was due")
        end = tensor.offset + tensor.spec.size_bytes
    if end != size_bytes:
        raise _broken(file, f"{size_bytes} bytes where the header speaks of {end}: truncated or overwritten")
    return Header(tensors, metadata)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value  # a lone surrogate is none


def _entry(file: Path, name: str, entry: Any, start: int) -> StoredTensor:
    if not is_tensor_name(name):
        raise _broken(file, f"tensor {shown(name)}, a name that cannot be printed or is too long")
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [begin, end]}:
            dtype = DTYPES.get(code)
        case _:
            raise _broken(file, f"tensor {name!r} without dtype, shape and data_offsets")
    if dtype is None:
        raise _broken(file, f"tensor {name!r} of dtype {shown(code)}", expected=", ".join(DTYPES))
    if not (is_shape(shape) and is_shape([begin]) and is_shape([end])):
        raise _broken(file, f"tensor {name!r} with shape {shown(shape)} and offsets {shown([begin, end])}")
    spec = TensorSpec(tuple(shape), dtype)
    if end - begin != spec.size_bytes:
        raise _broken(file, f"tensor {name!r}: {end - begin} bytes for {shape} {code}")
    return StoredTensor(name, spec, file, start + begin)


def is_shape(shape: Sequence[object]) -> bool:
    """Whether torch can make a tensor of it; also of one that is empty it multiplies the other sizes."""
    sizes = [n for n in shape if type(n) is int and 0 <= n < 2**63]
    return len(sizes) == len(shape) <= MAX_DIMENSIONS and math.prod(max(n, 1) for n in sizes) < 2**63


def is_tensor_name(name: str) -> bool:
    return name.isprintable() and len(name) <= MAX_NAME_LENGTH and name != METADATA


def _broken(file: Path, got: str, expected: str = "") -> SourceError:
    return SourceError(
        Problem(
            "not a sound safetensors file", str(file), got, expected,
            next_step="download or write this file again",
        )
    )  # fmt: skip
