"""The hub itself: two servers in threads, one for the API and one for the content, as the real one has.

Content is served from another origin, so that a client which sends its token there is found out. Every byte sent
is counted by path, and faults can be ordered for a path: a status, or a connection that is cut.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from hub import reading, writing
from hub.exchange import Answer, Refusal, Request
from hub.repository import Repository, files_of


@dataclass
class Fault:
    """What happens instead of the answer, or to it."""

    path: str  # a regular expression
    method: str
    times: int
    status: int | None
    headers: Mapping[str, str]
    cut_after: int | None  # bytes of the body


@dataclass
class Hub:
    root: Path  # where uploads are kept
    tokens: dict[str, str] = field(default_factory=dict)  # token → user
    read_only: set[str] = field(default_factory=set)  # tokens that may not write
    repositories: dict[str, Repository] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)  # path → bytes of bodies
    requests: list[str] = field(default_factory=list)  # "GET /path"
    leaks: list[str] = field(default_factory=list)  # content requests that carried a token
    faults: list[Fault] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def __enter__(self) -> Self:
        self.api, self.content = (_start(self, name) for name in ("api", "content"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for server in (self.api, self.content):
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.api.server_address[1]}"

    @property
    def content_url(self) -> str:
        return f"http://127.0.0.1:{self.content.server_address[1]}"

    @property
    def sent_bytes(self) -> int:
        return sum(self.sent.values())

    @property
    def files_sent(self) -> set[str]:
        """Files of repositories of which at least a part was sent."""
        paths = [path.replace("/cdn/", "/", 1).replace("/resolve/", "/", 1) for path, sent in self.sent.items() if sent]
        return {path.split("/", 4)[4] for path in paths if not path.startswith("/api/")}

    def add(self, name: str, folder: Path, *, private: bool = False, gated: bool = False, ref: str = "main") -> str:
        """A commit of the folder's files, in a new or a known repository; returns its hash."""
        repository = self.repositories.setdefault(name, Repository(name))
        repository.private, repository.gated = private, gated
        return repository.commit(files_of(folder), ref)

    def fail(
        self, path: str, times: int = 1, *, status: int | None = None, method: str = "GET",
        headers: Mapping[str, str] | None = None, cut_after: int | None = None,
    ) -> None:  # fmt: skip
        """The next `times` requests for a path that matches are answered with a status, or are cut short."""
        self.faults.append(Fault(path, method, times, status, headers or {}, cut_after))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


def _start(hub: Hub, name: str) -> ThreadingHTTPServer:
    handler = type("Handler", (_Handler,), {"hub": hub, "is_content": name == "content"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    is_content: bool
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the hub keeps its own list."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        request = self._read()
        with self.hub.lock:
            self.hub.requests.append(f"{request.method} {request.path}")
            if self.is_content and "Authorization" in self.headers:
                self.hub.leaks.append(request.path)
        fault = self.hub.take_fault(request.method, request.path)
        if fault and fault.status:
            self._send(request, Answer(fault.status, b"", dict(fault.headers)))
        else:
            self._send(request, self._answer(request), fault.cut_after if fault else None)

    def _read(self) -> Request:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        query = dict(parse_qsl(parts.query))
        return Request(self.command, unquote(parts.path), query, dict(self.headers.items()), body, token)

    def _chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return content

    def _answer(self, request: Request) -> Answer:
        routes = reading.CONTENT + writing.CONTENT if self.is_content else reading.API + writing.API
        try:
            for method, pattern, answer in routes:
                found = re.fullmatch(pattern, request.path)
                if found and method == request.method.replace("HEAD", "GET"):
                    return answer(self.hub, request, **found.groupdict())
        except Refusal as refusal:
            return refusal.answer
        return Refusal(404, "EntryNotFound", f"no route for {request.method} {request.path}").answer

    def _send(self, request: Request, answer: Answer, cut_after: int | None = None) -> None:
        start, stop, size_bytes = answer.bounds(request.headers.get("Range"))
        self.send_response(206 if (start, stop) != (0, size_bytes) else answer.status)
        if (start, stop) != (0, size_bytes):
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size_bytes}")
        for name, value in {**answer.headers, "Content-Length": str(stop - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if request.method == "HEAD":
            return
        for piece in answer.pieces(start, stop if cut_after is None else min(stop, start + cut_after)):
            self.wfile.write(piece)
            with self.hub.lock:
                self.hub.sent[request.path] += len(piece)
        if cut_after is not None:
            self.close_connection = True
