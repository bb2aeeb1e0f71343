"""Weights that torch pickled (`*.bin`), for who allows them: where each tensor stands; no bytes are read, no code runs.

torch.save writes a zip archive: data.pkl says which tensor is a view of which storage, data/0, data/1, … are the
storages. Under a FakeTensorMode torch.load makes the tensors without the storages, and notes for each storage where it
stands in the file (torch/serialization.py, `_checkpoint_offset`); that is all that a reader of rows needs.
"""

from __future__ import annotations

import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitroute.backends.base import CODES, TensorSpec
from bitroute.convert.document import shown
from bitroute.convert.layout import HEADER_LIMIT_BYTES, Header, StoredTensor, check_regular, is_tensor_name
from bitroute.errors import Problem, SourceError

Records = dict[int, int]  # where the bytes of a file in the archive begin → how many they are


def read_pickle(file: Path) -> Header:
    """The tensors of one file, as `read_header` gives those of a safetensors file.

    Raises:
        SourceError: it is no archive that torch.save wrote, it would run code, it holds anything but contiguous
            tensors, or it contradicts itself.
    """
    try:
        check_regular(file)
        with zipfile.ZipFile(file) as archive:
            records = _records(archive, file)
    except OSError as error:
        raise SourceError(Problem("cannot read the file", str(file), got=str(error))) from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error) as error:
        raise _refused(file, f"no zip archive that can be read: {error}", "what torch.save writes since 1.6") from error
    content = _load(file)
    if not isinstance(content, dict):  # its values may be of any size and depth: none is shown
        raise _refused(file, f"an object of type {type(content).__name__}", "tensors by name")
    return Header({name: _tensor(name, value, records, file) for name, value in content.items()}, {})


def _records(archive: zipfile.ZipFile, file: Path) -> Records:
    """Only what stands in the file as it is: a compressed record has no offset, and could be of any size."""
    records = archive.infolist()
    if len({record.filename for record in records}) < len(records):
        raise _refused(file, "two records of the same name")
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise _refused(file, f"a compressed or encrypted record {shown(record.filename)}")
        if record.filename.endswith("/data.pkl"):
            if record.file_size > HEADER_LIMIT_BYTES:
                raise _refused(file, f"{record.file_size} bytes of names and shapes")
            archive.read(record)  # checks its CRC, which torch does not
        if record.filename.endswith("/byteorder") and (record.file_size != 6 or archive.read(record) != b"little"):
            raise _refused(file, "numbers with the high byte first")
    return {_begin(archive, record): record.file_size for record in records}


def _begin(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> int:
    """Behind the local header, whose name and extra field have lengths of their own (PKWARE APPNOTE 4.3.7).

    Those are in no checksum; but behind each record stands its data descriptor, or else the next header.
    """
    stream = archive.fp
    assert stream is not None  # it is open
    stream.seek(record.header_offset)
    signature, name_length, extra_length = struct.unpack("<4s22xHH", stream.read(30))
    begin = int(record.header_offset + 30 + name_length + extra_length)
    stream.seek(begin + record.file_size)
    behind = (b"PK\x07\x08",) if record.flag_bits & 8 else (b"PK\x03\x04", b"PK\x01\x02")
    if signature != b"PK\x03\x04" or stream.read(4) not in behind:
        raise zipfile.BadZipFile(f"{shown(record.filename)} is not where the archive says")
    return begin


def _load(file: Path) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode  # half a second that only pickles cost

    try:
        with FakeTensorMode():
            return torch.load(file, weights_only=True)
    except Exception as error:  # an unpickler raises whatever the bytes make it raise
        words = str(error) or type(error).__name__
        said = re.search(r"GLOBAL \S+", words) or re.search(r"(?<=WeightsUnpickler error: )[^\n]+", words)
        got = said[0] if said else words.strip().splitlines()[0]
        raise _refused(file, shown(got), "tensors alone: nothing else is loaded, for it could run code") from error


def _tensor(name: object, value: object, records: Records, file: Path) -> StoredTensor:
    if not isinstance(name, str):
        raise _refused(file, f"a key of type {type(name).__name__}", "tensors by name")
    if not is_tensor_name(name):
        raise _refused(file, f"a tensor of the name {shown(name)}")
    if not isinstance(value, Tensor):
        raise _refused(file, f"{type(value).__name__} under {name!r}", "tensors by name")
    if value.layout != torch.strided or value.dtype not in CODES or not value.is_contiguous():
        got = f"tensor {name!r}: {value.dtype}, {value.layout}, {'' if value.is_contiguous() else 'not '}contiguous"
        raise _refused(file, got, "contiguous tensors of " + ", ".join(CODES.values()))
    storage = value.untyped_storage()
    offset = getattr(storage, "_checkpoint_offset", None)
    if offset is None or records.get(offset) != storage.nbytes():
        raise _refused(file, f"tensor {name!r}, whose bytes are not where torch.save puts them")
    spec = TensorSpec(tuple(value.shape), value.dtype)
    begin = value.storage_offset() * value.dtype.itemsize
    if begin + spec.size_bytes > storage.nbytes():
        raise _refused(file, f"tensor {name!r}, which ends behind its bytes")
    return StoredTensor(name, spec, file, offset + begin)


def _refused(file: Path, got: str, expected: str = "") -> SourceError:
    return SourceError(
        Problem(
            "not a pickle that can be read safely", str(file), got, expected,
            next_step="load it where you trust it, and save it as safetensors",
        )
    )  # fmt: skip
