"""GGUF files: names, shapes and places from the header, weights decoded when they are read.

Layout (github.com/ggml-org/ggml, docs/gguf.md): magic, version, two counts, key-value pairs, an entry for each tensor,
the payloads at multiples of the alignment. Numbers are little-endian; the innermost dimension stands first.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from bitroute.backends.base import TensorSpec
from bitroute.convert.decoded import derive
from bitroute.convert.document import printable, shown
from bitroute.convert.ggml import FORMATS, PLAIN, BlockFormat, decode_blocks
from bitroute.convert.layout import StoredTensor, check_regular, is_shape, is_tensor_name
from bitroute.errors import Problem, SourceError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER_LIMIT_BYTES = 32_000_000  # the tokenizer of a language model with 256,000 words takes 17
MAX_ENTRIES = 100_000  # pairs, tensors
NAME_LIMIT_BYTES = 65_536
MAX_DIMENSIONS = 4
ALIGNMENT, ORIGINAL_SHAPE = "general.alignment", "comfy.gguf.orig_shape."
TEXT, LIST = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
SHORT_LIST = 16  # numbers of a list that is kept; longer ones belong to a tokenizer


def read_gguf(file: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, StoredTensor]:
    """Name → tensor; those in blocks are derived, in `dtype`, the others are as they are stored.

    Raises:
        SourceError: not a GGUF file, truncated, a header that contradicts itself, or a type that is not known.
    """
    try:
        check_regular(file)
        with open(file, "rb") as stream:
            return _Reader(file, stream, os.path.getsize(file)).tensors(dtype)
    except OSError as error:
        raise SourceError(Problem("cannot read the file", str(file), got=str(error))) from error


@dataclass
class _Entry:
    name: str
    shape: tuple[int, ...]  # the outermost dimension first
    kind: int
    offset: int  # below the start of the payloads


@dataclass
class _Reader:
    """Every read is checked against the end of the file and a limit."""

    file: Path
    stream: BufferedReader
    size_bytes: int
    facts: dict[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype) -> dict[str, StoredTensor]:
        if self._take(4) != MAGIC or self._number("I") not in VERSIONS:
            raise self._broken("another beginning", f"GGUF version {' or '.join(map(str, VERSIONS))}")
        count, pairs = self._number("Q"), self._number("Q")
        if max(count, pairs) > MAX_ENTRIES:
            raise self._broken(f"{count} tensors and {pairs} facts", f"at most {MAX_ENTRIES}")
        for _ in range(pairs):
            key, value = self._text(), self._value(self._number("I"))
            self.facts |= {key: value} if key.startswith((ALIGNMENT, ORIGINAL_SHAPE)) else {}
        entries = [self._entry() for _ in range(count)]
        start = self._aligned(self.stream.tell())
        self._check_places(entries)
        found = {entry.name: self._tensor(entry, start, dtype) for entry in entries}
        if len(found) < len(entries):
            raise self._broken("two tensors of one name")
        return found

    def _take(self, size_bytes: int) -> bytes:
        self._check(size_bytes)
        return self.stream.read(size_bytes)

    def _check(self, size_bytes: int) -> None:
        if self.stream.tell() + size_bytes > min(self.size_bytes, HEADER_LIMIT_BYTES):
            raise self._broken(f"a header that goes on for {size_bytes} bytes from byte {self.stream.tell()}")

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _text(self) -> str:
        length = self._number("Q")
        self._check(length)
        if length > NAME_LIMIT_BYTES:  # a template or a merge table, none of which names a tensor
            self.stream.seek(length, os.SEEK_CUR)
            return ""
        return self.stream.read(length).decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        """Of a number, a text or a short list of numbers; None for what is passed over."""
        if kind == TEXT:
            return self._text()
        if kind in NUMBERS:
            return self._number(NUMBERS[kind])
        if kind != LIST:
            raise self._broken(f"a value of type {kind}")
        kind, count = self._number("I"), self._number("Q")
        if kind == TEXT:
            for _ in range(count):
                self._text()
            return None
        if kind not in NUMBERS:
            raise self._broken(f"a list of values of type {kind}")
        if count <= SHORT_LIST:
            return [self._number(NUMBERS[kind]) for _ in range(count)]
        size_bytes = count * struct.calcsize(f"<{NUMBERS[kind]}")
        self._check(size_bytes)
        self.stream.seek(size_bytes, os.SEEK_CUR)
        return None

    def _entry(self) -> _Entry:
        name, dimensions = self._text(), self._number("I")
        if not name or not is_tensor_name(name) or not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._broken(f"tensor {shown(name)} of {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        if not is_shape(shape):
            raise self._broken(f"tensor {shown(name)} with shape {shown(list(shape))}")
        return _Entry(name, shape, self._number("I"), self._number("Q"))

    def _aligned(self, offset: int) -> int:
        alignment = self.facts.get(ALIGNMENT, 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
            raise self._broken(f"an alignment of {shown(alignment)}")
        return -(-offset // alignment) * alignment

    def _check_places(self, entries: list[_Entry]) -> None:
        """A place that was changed gives the weights of another tensor; ggml allows no gap either, other tools do."""
        end = 0
        for entry in sorted(entries, key=lambda entry: (entry.offset, math.prod(entry.shape))):
            blocks = FORMATS.get(entry.kind)
            numel, dtype = math.prod(entry.shape), PLAIN.get(entry.kind, torch.uint8)
            if entry.offset < end or entry.offset != self._aligned(entry.offset):
                raise self._broken(f"tensor {entry.name!r} at byte {entry.offset} of the payloads, {end} was due")
            end = entry.offset + (numel // blocks.weights * blocks.size_bytes if blocks else numel * dtype.itemsize)

    def _tensor(self, entry: _Entry, start: int, dtype: torch.dtype) -> StoredTensor:
        blocks = FORMATS.get(entry.kind)
        if blocks is None and entry.kind not in PLAIN:
            known = ", ".join([*(found.name for found in FORMATS.values()), "F32, F16, BF16"])
            raise self._broken(f"tensor {entry.name!r} of type {entry.kind}", known)
        numel = math.prod(entry.shape)
        if blocks and entry.shape[-1] % blocks.weights:
            raise self._broken(f"tensor {entry.name!r} of {list(entry.shape)} in blocks of {blocks.weights}")
        spec = (
            TensorSpec((numel // blocks.weights, blocks.size_bytes), torch.uint8)
            if blocks
            else TensorSpec(self._shape(entry, numel), PLAIN[entry.kind])
        )
        stored = StoredTensor(entry.name, spec, self.file, start + entry.offset)
        if stored.offset + spec.size_bytes > self.size_bytes:
            raise self._broken(f"tensor {entry.name!r} beyond the end of the file: truncated")
        return _derived(stored, blocks, self._shape(entry, numel), dtype) if blocks else stored

    def _shape(self, entry: _Entry, numel: int) -> tuple[int, ...]:
        """ComfyUI's converter flattens some weights and keeps their shape beside them."""
        original = self.facts.get(f"{ORIGINAL_SHAPE}{entry.name}")
        if original is None:
            return entry.shape
        if not (isinstance(original, list) and all(type(n) is int and n >= 0 for n in original)):
            raise self._broken(f"tensor {entry.name!r} with the original shape {shown(original)}")
        if math.prod(original) != numel:
            raise self._broken(f"tensor {entry.name!r} of {list(entry.shape)} with the original shape {original}")
        return tuple(original)

    def _broken(self, got: str, expected: str = "") -> SourceError:
        return SourceError(
            Problem(
                "not a sound GGUF file", str(self.file), printable(got), expected,
                next_step="download or write this file again",
            )
        )  # fmt: skip


def _derived(stored: StoredTensor, blocks: BlockFormat, shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
    return derive(
        stored.name, {"blocks": stored}, shape, dtype,
        lambda given: decode_blocks(given["blocks"], blocks).reshape(shape),
    )  # fmt: skip
