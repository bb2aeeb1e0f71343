"""Files that get their names only when they are whole and on the disk, and that are never written through a link."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from bitroute.convert.workers import check_stop

CHUNK_BYTES = 2**18  # stays in the cache
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_json(file: Path, content: dict[str, Any], draft: Path | None = None, indent: int | None = 1) -> None:
    """draft: the name until the file is whole, by default NAME.part. Python takes 20 times as long to indent."""
    write_text(file, json.dumps(content, indent=indent), draft)


def write_text(file: Path, text: str, draft: Path | None = None) -> None:
    with whole(file, draft) as stream:
        write_all(stream, f"{text}\n".encode())


def copy(source: Path, target: Path) -> None:
    with whole(target) as stream:
        for chunk in read_chunks(source):
            write_all(stream, chunk)


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    for chunk in read_chunks(file):
        digest.update(chunk)
    return digest.hexdigest()


def read_chunks(file: Path, begin: int = 0, size_bytes: int = sys.maxsize) -> Iterator[memoryview]:
    """So many bytes from `begin` on, or as many as there are; each chunk in the place of the one before."""
    buffer, left = memoryview(bytearray(CHUNK_BYTES)), size_bytes
    with named(file), FileIO(file) as stream:
        stream.seek(begin)
        while got := stream.readinto(buffer[: min(left, CHUNK_BYTES)]):
            check_stop()
            left -= got
            yield buffer[:got]


@contextmanager
def whole(file: Path, draft: Path | None = None) -> Iterator[FileIO]:
    """A stream whose file gets its name at the end, unless there was an error."""
    draft = draft or file.with_name(f"{file.name}.part")
    make_folder(file.parent)
    with named(draft), create(draft) as stream:
        yield stream
        os.fsync(stream.fileno())
    publish(draft, file)


def take_lock(place: Path) -> FileLock:
    """The lock beside a file or folder that one process at a time may write; raises filelock's Timeout where it is."""
    place = place.resolve()  # `.` has no name
    lock = FileLock(place.with_name(f".{place.name}.bitroute.lock"))
    lock.acquire(timeout=0)
    return lock


@contextmanager
def held(lock: FileLock) -> Iterator[None]:
    """Until the end, when no file of it is left."""
    try:
        yield
    finally:
        with suppress(OSError):  # where an open file cannot be removed, the release does it
            Path(lock.lock_file).unlink()
        lock.release()


def create(file: Path) -> FileIO:
    """A new file of that name; whatever had the name before is unlinked, never written through."""
    file.unlink(missing_ok=True)
    return FileIO(file, "xb")


def write_all(stream: FileIO, data: bytes | memoryview) -> None:
    """A disk that fills up takes a part and says so only to the next write."""
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]


def reserve(stream: FileIO, size_bytes: int) -> None:
    """Has Linux find the room at once, which halves the cost of writing; or fail now, where there is none.

    Some file systems cannot do that, and posix_fallocate would write to every block of theirs.
    """
    if sys.platform == "linux":
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
        failed = fallocate(stream.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(size_bytes))
        if failed and ctypes.get_errno() in FULL:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def advise(stream: FileIO, what: Literal["WILLNEED", "DONTNEED"], offset: int, size_bytes: int) -> None:
    """Has Linux read ahead; or forget what it keeps of the file, and what is not on the disk yet begin to write."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), offset, size_bytes, getattr(os, f"POSIX_FADV_{what}"))


def publish(draft: Path, file: Path) -> None:
    os.replace(draft, file)
    sync(file.parent)


def make_folder(folder: Path) -> None:
    """The folder and its parents, each on the disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(folder: Path) -> None:
    """Names are on the disk when their folder is; systems that cannot do this write them in order by themselves."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def named(file: Path) -> Iterator[None]:
    """An OSError of a stream does not say which file it is about."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise
