"""A request and its answer, as the routes see them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PIECE_BYTES = 2**16


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    token: str

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes | Path
    headers: Mapping[str, str] = field(default_factory=dict)

    def bounds(self, wanted: str | None) -> tuple[int, int, int]:
        """First byte, the byte after the last, and the size; the whole body unless a range of a file is wanted."""
        size_bytes = self.body.stat().st_size if isinstance(self.body, Path) else len(self.body)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "") if self.status == 200 else None
        if not found:
            return 0, size_bytes, size_bytes
        return int(found[1]), min(int(found[2]) + 1, size_bytes) if found[2] else size_bytes, size_bytes

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        if isinstance(self.body, bytes):
            yield self.body[start:stop]
            return
        with open(self.body, "rb") as stream:
            stream.seek(start)
            while start < stop:
                piece = stream.read(min(PIECE_BYTES, stop - start))
                start += len(piece)
                yield piece


def answer_json(content: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **headers})


class Refusal(Exception):
    """An error as the Hub words it: the client reads X-Error-Code."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(message or code)
        headers = {"X-Error-Code": code, "X-Error-Message": message or code}
        self.answer = answer_json({"error": message or code}, status, **{k: v for k, v in headers.items() if v})
