"""What a client can read: information, listings, files. The endpoints of huggingface_hub 2.4, hf_api.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hub.exchange import Answer, Refusal, Request, answer_json
from hub.repository import Blob, Repository

if TYPE_CHECKING:
    from hub.server import Hub

Route = tuple[str, str, Callable[..., Answer]]
NAME = r"(?P<name>[^/]+/[^/]+)"
GATED = "Access to model {name} is restricted and you are not in the authorized list."


def user_of(hub: Hub, request: Request) -> str | None:
    if request.token and request.token not in hub.tokens:
        raise Refusal(401, "", "Invalid credentials in Authorization header")
    return hub.tokens.get(request.token)


def find(hub: Hub, request: Request, name: str) -> Repository:
    """The Hub does not tell a private repository from a missing one; without a token both are 401."""
    user = user_of(hub, request)
    repository = hub.repositories.get(name)
    if repository is None or (repository.private and not repository.allows(user)):
        raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
    return repository


def find_open(hub: Hub, request: Request, name: str) -> Repository:
    """A repository whose files the user may read."""
    repository = find(hub, request, name)
    user = user_of(hub, request)
    if repository.gated and not repository.allows(user):
        raise Refusal(403 if user else 401, "GatedRepo", GATED.format(name=name))
    return repository


def commit_of(repository: Repository, revision: str) -> str:
    commit = repository.find(revision)
    if commit is None:
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return commit


def whoami(hub: Hub, request: Request) -> Answer:
    user = user_of(hub, request)
    if user is None:
        raise Refusal(401, "", "Invalid username or password.")
    role = "read" if request.token in hub.read_only else "write"
    return answer_json({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": role}}})


def model_info(hub: Hub, request: Request, name: str, revision: str = "main") -> Answer:
    repository = find(hub, request, name)
    commit = commit_of(repository, revision)
    siblings: list[dict[str, Any]] = []
    for path, blob in repository.commits[commit].items():
        lfs = {"sha256": blob.sha256, "size": blob.size_bytes, "pointerSize": 134} if blob.sha256 else None
        more = {"size": blob.size_bytes, "blobId": blob.oid, **({"lfs": lfs} if lfs else {})}
        siblings.append({"rfilename": path, **(more if request.query.get("blobs") else {})})
    content = {
        "id": name, "sha": commit, "private": repository.private, "gated": "manual" if repository.gated else False,
        "disabled": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings,
    }  # fmt: skip
    return answer_json(content)


def list_models(hub: Hub, request: Request) -> Answer:
    """Public ones by owner and by part of the name."""
    author, part = request.query.get("author", ""), request.query.get("search", "").lower()
    names = [
        name
        for name, repository in hub.repositories.items()
        if not repository.private and name.startswith(f"{author}/" if author else "") and part in name.lower()
    ]
    return answer_json([{"id": name, "private": False, "downloads": 0, "likes": 0, "tags": []} for name in names])


def tree(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    repository = find(hub, request, name)
    commit = commit_of(repository, revision)
    return answer_json([_entry(path, blob) for path, blob in repository.commits[commit].items()])


def paths_info(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    repository = find(hub, request, name)
    files = repository.commits[commit_of(repository, revision)]
    return answer_json([_entry(path, files[path]) for path in request.json["paths"] if path in files])


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    lfs = {"lfs": blob.lfs} if blob.lfs else {}
    return {"type": "file", "path": path, "size": blob.size_bytes, "oid": blob.oid, **lfs}


def refs(hub: Hub, request: Request, name: str) -> Answer:
    repository = find(hub, request, name)
    found: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    for ref, commit in repository.refs.items():
        pull_request = ref.startswith("refs/pr/")
        full = ref if pull_request else f"refs/heads/{ref}"
        found["pullRequests" if pull_request else "branches"].append({"name": ref, "ref": full, "targetCommit": commit})
    return answer_json(found)


def check_access(hub: Hub, request: Request, name: str) -> Answer:
    find_open(hub, request, name)
    return answer_json({})


def resolve(hub: Hub, request: Request, name: str, revision: str, path: str) -> Answer:
    """Small files from here; files in LFS by a redirect to the content server, with what the client needs to know."""
    repository = find_open(hub, request, name)
    commit = commit_of(repository, revision)
    blob = repository.commits[commit].get(path)
    if blob is None:
        raise Refusal(404, "EntryNotFound", "Entry not found")
    headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    if blob.sha256 is None:
        return Answer(200, blob.file, headers)
    linked = {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size_bytes)}
    location = f"{hub.content_url}/cdn/{name}/{commit}/{quote(path)}"
    return Answer(302, b"", {**headers, **linked, "Location": location})


def content(hub: Hub, request: Request, name: str, commit: str, path: str) -> Answer:
    blob = hub.repositories[name].commits[commit][path]
    return Answer(200, blob.file, {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"})


API: list[Route] = [
    ("GET", "/api/whoami-v2", whoami),
    ("GET", "/api/models", list_models),
    ("GET", f"/api/models/{NAME}", model_info),
    ("GET", f"/api/models/{NAME}/revision/(?P<revision>.+)", model_info),
    ("GET", f"/api/models/{NAME}/tree/(?P<revision>.+)", tree),
    ("POST", f"/api/models/{NAME}/paths-info/(?P<revision>.+)", paths_info),
    ("GET", f"/api/models/{NAME}/refs", refs),
    ("GET", f"/api/models/{NAME}/auth-check", check_access),
    ("GET", f"/{NAME}/resolve/(?P<revision>refs/pr/\\d+|[^/]+)/(?P<path>.+)", resolve),
]
CONTENT: list[Route] = [("GET", f"/cdn/{NAME}/(?P<commit>[0-9a-f]+)/(?P<path>.+)", content)]
