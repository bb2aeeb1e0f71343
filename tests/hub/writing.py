"""What a client can write: repositories, branches, files in LFS and small ones, commits, pull requests.

The endpoints of huggingface_hub 2.4 (_commit_api.py, lfs.py) with Xet switched off (HF_HUB_DISABLE_XET=1).
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from hub.cards import validate_card
from hub.exchange import Answer, Refusal, Request, answer_json
from hub.reading import NAME, Route, commit_of, find, user_of
from hub.repository import LFS_SUFFIXES, Blob, Repository

if TYPE_CHECKING:
    from hub.server import Hub


def find_writable(hub: Hub, request: Request, name: str) -> Repository:
    repository = find(hub, request, name)
    if user_of(hub, request) != name.partition("/")[0] or request.token in hub.read_only:
        raise Refusal(403, "", "You don't have the rights to write to this repository")
    return repository


def create(hub: Hub, request: Request) -> Answer:
    user = user_of(hub, request)
    owner = request.json["organization"] or user
    name = f"{owner}/{request.json['name']}"
    if user is None:
        raise Refusal(401, "", "Invalid username or password.")
    if owner != user:
        raise Refusal(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
    known = name in hub.repositories
    if not known:
        private = request.json.get("visibility") == "private" or bool(request.json.get("private"))
        hub.repositories[name] = Repository(name, private=private)
        hub.repositories[name].commit({}, message="initial commit")
    content = {"url": f"{hub.url}/{name}", "name": name, "id": name}
    return answer_json({**content, "error": "You already created this model repo"} if known else content,
                       409 if known else 200)  # fmt: skip


def check_write_access(hub: Hub, request: Request, name: str) -> Answer:
    find_writable(hub, request, name)
    return answer_json({})


def create_branch(hub: Hub, request: Request, name: str, branch: str) -> Answer:
    repository = find_writable(hub, request, name)
    if branch in repository.refs:
        raise Refusal(409, "", "Reference already exists")
    repository.refs[branch] = commit_of(repository, request.json.get("startingPoint") or "main")
    return answer_json({})


def open_discussion(hub: Hub, request: Request, name: str) -> Answer:
    """Only pull requests."""
    repository = find(hub, request, name)
    number = repository.pull_request(repository.refs["main"])
    return answer_json({"num": number, "url": f"{hub.url}/{name}/discussions/{number}", "pullRequest": True})


def preupload(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    """How each file is to be sent, and its git hash if it is there already."""
    repository = find_writable(hub, request, name)
    there = repository.commits[commit_of(repository, revision)]
    files = []
    for file in request.json["files"]:
        lfs = file["size"] > 10 * 2**20 or file["path"].endswith(LFS_SUFFIXES)
        blob = there.get(file["path"])
        oid = {"oid": blob.etag} if blob else {}
        files.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **oid})
    return answer_json({"files": files})


def batch(hub: Hub, request: Request, name: str) -> Answer:
    """Where to put each object that is not there yet."""
    find_writable(hub, request, name)
    objects: list[dict[str, Any]] = []
    for wanted in request.json["objects"]:
        upload = {"href": f"{hub.content_url}/upload/{wanted['oid']}"}
        verify = {"href": f"{hub.url}/{name}/lfs/verify"}
        known = _object(hub, wanted["oid"]).is_file()
        objects.append({**wanted, **({} if known else {"actions": {"upload": upload, "verify": verify}})})
    return answer_json({"transfer": "basic", "objects": objects})


def upload(hub: Hub, request: Request, oid: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, "", "the content does not have this hash")
    place = _object(hub, oid)
    place.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=place.parent, delete=False) as stream:  # the same object may arrive twice at a time
        stream.write(request.body)
    Path(stream.name).replace(place)
    return Answer(200, b"")


def verify(hub: Hub, request: Request, name: str) -> Answer:
    place = _object(hub, request.json["oid"])
    if not place.is_file() or place.stat().st_size != request.json["size"]:
        raise Refusal(404, "", "the object was not uploaded")
    return answer_json({})


def commit(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    """The operations of an ndjson body on top of a ref; nothing happens where one of them cannot be done."""
    repository = find_writable(hub, request, name)
    parent = commit_of(repository, revision)
    operations = [json.loads(line) for line in request.body.splitlines()]
    header = operations[0]["value"]
    if header.get("parentCommit") not in (None, parent):
        raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
    files = dict(repository.commits[parent])
    for operation in operations[1:]:
        _apply(hub, files, operation["key"], operation["value"])
    more: dict[str, Any] = {}
    if request.query.get("create_pr"):
        number = repository.pull_request(parent)
        revision = f"refs/pr/{number}"
        more = {"pullRequestUrl": f"{hub.url}/{name}/discussions/{number}"}
    sha = repository.commit(files, revision, header["summary"])
    return answer_json({"commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True, **more})


def _apply(hub: Hub, files: dict[str, Blob], kind: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if kind == "file":
        body = base64.b64decode(value["content"])
        place = _object(hub, hashlib.sha256(body).hexdigest())
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(body)
        files[path] = Blob.of(path, place)
    elif kind == "lfsFile":
        place = _object(hub, value["oid"])
        if not place.is_file():
            raise Refusal(400, "", f"the object of {path} was not uploaded")
        files[path] = Blob.of(path, place)
    elif kind == "deletedFile":
        del files[path]
    elif kind == "deletedFolder":
        for inside in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
            del files[inside]
    else:
        raise Refusal(400, "", f"unknown operation {kind}")


def _object(hub: Hub, oid: str) -> Path:
    return hub.root / "objects" / oid


API: list[Route] = [
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate_card),
    ("GET", f"/api/models/{NAME}/auth-check/write", check_write_access),
    ("POST", f"/api/models/{NAME}/branch/(?P<branch>.+)", create_branch),
    ("POST", f"/api/models/{NAME}/discussions", open_discussion),
    ("POST", f"/api/models/{NAME}/preupload/(?P<revision>.+)", preupload),
    ("POST", f"/api/models/{NAME}/commit/(?P<revision>.+)", commit),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/batch", batch),
    ("POST", f"/{NAME}/lfs/verify", verify),
]
CONTENT: list[Route] = [("PUT", "/upload/(?P<oid>[0-9a-f]{64})", upload)]
