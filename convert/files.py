"""Files that get their names only when they are whole, and that are never written through a link."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from io import FileIO
from pathlib import Path
from typing import Any


def write_json(file: Path, content: dict[str, Any]) -> None:
    write_text(file.with_name(file.name + ".part"), json.dumps(content, indent=1))
    os.replace(file.with_name(file.name + ".part"), file)


def write_text(file: Path, text: str) -> None:
    with create(file) as stream:
        stream.write((text + "\n").encode())
        os.fsync(stream.fileno())


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    with open(source, "rb") as origin, create(partial) as stream:
        shutil.copyfileobj(origin, stream, 1 << 20)
        os.fsync(stream.fileno())
    os.replace(partial, target)


def create(file: Path) -> FileIO:
    """A new file of that name; whatever had the name before is unlinked, never written through."""
    file.unlink(missing_ok=True)
    return FileIO(file, "xb")


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
