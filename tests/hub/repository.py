"""What the hub holds: repositories with commits, each a mapping of paths to files on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LFS_SUFFIXES = (".safetensors", ".bin", ".msgpack", ".onnx", ".pt", ".model", ".png")
HASHED_BYTES = 2**26  # larger files are sparse ones, which nobody downloads: their digest is made up


@dataclass(frozen=True)
class Blob:
    """A file in a commit."""

    file: Path
    size_bytes: int
    oid: str  # of git, SHA-1
    sha256: str | None  # of files in LFS

    @classmethod
    def of(cls, name: str, file: Path) -> Blob:
        size_bytes = file.stat().st_size
        content = file.read_bytes() if size_bytes <= HASHED_BYTES else f"{name} {size_bytes}".encode()
        oid = hashlib.sha1(b"blob %d\0" % size_bytes + content).hexdigest()
        lfs = size_bytes > HASHED_BYTES or name.endswith(LFS_SUFFIXES)
        return cls(file, size_bytes, oid, hashlib.sha256(content).hexdigest() if lfs else None)

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    @property
    def lfs(self) -> dict[str, Any] | None:
        """As the tree listing gives it."""
        return {"oid": self.sha256, "size": self.size_bytes, "pointerSize": 134} if self.sha256 else None


Files = Mapping[str, Blob]  # path in the repository → file


@dataclass
class Repository:
    name: str  # owner/name
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)  # who may read, beside the owner
    refs: dict[str, str] = field(default_factory=dict)  # branch or refs/pr/N → commit
    commits: dict[str, Files] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)  # commit → its summary

    def commit(self, files: Files, ref: str = "main", message: str = "") -> str:
        text = "".join(f"{path} {blob.etag}\n" for path, blob in sorted(files.items()))
        sha = hashlib.sha1(f"{self.refs.get(ref)} {text}".encode()).hexdigest()
        self.commits[sha], self.refs[ref], self.messages[sha] = dict(files), sha, message
        return sha

    def find(self, revision: str) -> str | None:
        """The commit of a branch, a pull request or a commit."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def allows(self, user: str | None) -> bool:
        return user is not None and (user == self.name.partition("/")[0] or user in self.readers)

    def pull_request(self, base: str) -> int:
        """Opens one; its number."""
        number = 1 + sum(ref.startswith("refs/pr/") for ref in self.refs)
        self.refs[f"refs/pr/{number}"] = base
        return number


def files_of(folder: Path) -> dict[str, Blob]:
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return {(name := file.relative_to(folder).as_posix()): Blob.of(name, file) for file in found}
