"""The Hugging Face Hub through huggingface_hub: a repository at one commit, its files, errors in plain words."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_cached_repo_tree, get_token, hf_hub_url, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff, validate_repo_id
from huggingface_hub.utils import httpx as http  # exported for users of the client

from bitroute.errors import BitrouteError, Problem, SourceError, did_you_mean

PAGE = "https://huggingface.co/"
TIMEOUT_S = 30.0
WAITS_S = (1, 2, 4)  # after an answer of 5xx, and after 429 without Retry-After
LONGEST_WAIT_S = 300  # the Hub counts requests by windows of five minutes
TEMPORARY = (429, 500, 502, 503, 504)
Found = TypeVar("Found")


@dataclass(frozen=True)
class HubModel:
    """A model repository at one commit."""

    repo: str  # owner/name
    commit: str
    sizes: Mapping[str, int]  # every file → bytes
    revision: str | None = None  # what was asked for: a branch, a tag, a commit; None is the default branch


def parse_hub_id(model: str) -> tuple[str, str | None] | None:
    """Repository and revision of `owner/name` or `owner/name@revision`; None for what can be neither."""
    repo, _, revision = model.partition("@")
    try:
        validate_repo_id(repo)
    except hub_errors.HFValidationError:
        return None
    return (repo, revision or None) if "/" in repo else None


def find_model(repo: str, revision: str | None = None) -> HubModel:
    """Asks the Hub which commit the revision is, and for the names and sizes of its files.

    Raises:
        SourceError: no such repository or revision, no access, no network.
    """
    with explained(repo, revision):
        info = _patiently(lambda: api().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S))
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if _is_inside(file.rfilename)}
    return HubModel(repo, info.sha or "", sizes, revision)


def find_cached(repo: str, revision: str | None = None) -> HubModel:
    """The same from what earlier downloads left in the cache, without network.

    Raises:
        SourceError: nothing of that revision is there.
    """
    try:
        commit = api().resolve_revision(repo, revision=revision, local_files_only=True).resolved
        folder = snapshot_folder(repo, commit)
    except (hub_errors.RevisionResolutionError, hub_errors.LocalEntryNotFoundError) as error:
        raise SourceError(_not_cached(repo, revision)) from error
    try:
        sizes = {file.path: file.size for file in get_cached_repo_tree(repo, revision=commit)}
    except hub_errors.CachedRepoTreeNotFoundError:  # downloaded by an older huggingface_hub
        files = [file for file in folder.rglob("*") if file.is_file()]
        sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    return HubModel(repo, commit, sizes, revision)


def snapshot_folder(repo: str, commit: str) -> Path:
    """Where the cache keeps the files of a commit; raises LocalEntryNotFoundError where it has no model of it."""
    index = ["model_index.json", "config.json"]
    return Path(snapshot_download(repo, revision=commit, allow_patterns=index, local_files_only=True))


def read_bytes(model: HubModel, file: str, stop: int | None = None) -> bytes:
    """A file's first `stop` bytes, or all of them, into memory; asked again as often as the client does.

    Raises:
        SourceError: no access, no network, or a server that cannot send a part of a file.
    """
    headers = build_hf_headers(library_name="bitroute", library_version=version("bitroute"))
    headers |= {"Range": f"bytes=0-{stop - 1}", "Accept-Encoding": "identity"} if stop is not None else {}
    url = hf_hub_url(model.repo, file, revision=model.commit)
    with (
        explained(model.repo, model.revision),
        http_stream_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response,
    ):
        hf_raise_for_status(response)
        if stop is not None and stop < model.sizes[file] and response.status_code != 206:
            raise SourceError(Problem("the server sends whole files only", url, next_step="download the model first"))
        content: bytes = response.read()
        return content


def api() -> HfApi:
    return HfApi(library_name="bitroute", library_version=version("bitroute"))


def remember_branch(model: HubModel) -> None:
    """Leaves in the cache which commit the branch is, for offline mode; whether that works is not important."""
    with suppress(http.HTTPError, OSError, hub_errors.RevisionResolutionError):
        api().resolve_revision(model.repo, revision=model.revision)


@contextmanager
def explained(repo: str, revision: str | None = None, kind: type[BitrouteError] = SourceError) -> Iterator[None]:
    """Whatever the client raises becomes a `kind` that says what to do."""
    try:
        yield
    except (http.HTTPError, http.InvalidURL, OSError, hub_errors.XetDownloadError) as error:
        raise kind(_problem(repo, revision, _cause(error))) from error


def _patiently(ask: Callable[[], Found]) -> Found:
    """Calls that the client itself does not repeat."""
    for wait in WAITS_S:
        try:
            return ask()
        except hub_errors.HfHubHTTPError as error:
            said = error.response.headers.get("Retry-After", "")
            seconds = int(said) if said.isdecimal() else wait
            if error.response.status_code not in TEMPORARY or seconds > LONGEST_WAIT_S:
                raise
        time.sleep(seconds)
    return ask()


def _cause(error: BaseException) -> BaseException:
    """The client says "not in the cache" where the network was the reason."""
    while isinstance(error, hub_errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    return error


def _problem(repo: str, revision: str | None, error: BaseException) -> Problem:
    if isinstance(error, hub_errors.GatedRepoError):
        return _gated(repo, error)
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return _no_repository(repo)
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return _no_revision(repo, revision)
    if isinstance(error, hub_errors.OfflineModeIsEnabled | hub_errors.LocalEntryNotFoundError):
        return _not_cached(repo, revision)
    if isinstance(error, hub_errors.HfHubHTTPError):
        return _refused(repo, error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        mend = "free some room, or set HF_HOME to a folder on another disk"
        return Problem("the disk is full", str(error.filename or constants.HF_HUB_CACHE), next_step=mend)
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
        mend = "set HF_HOME to a folder that you may write"
        return Problem("the download cache cannot be written", constants.HF_HUB_CACHE, str(error), next_step=mend)
    return Problem(
        "no such folder here, and the Hub cannot be reached", repo, got=f"{type(error).__name__}: {error}"[:300],
        next_step="if a folder is meant, check its name; else check the network and run the same command again: "
        "complete files are not downloaded twice, and HF_HUB_OFFLINE=1 uses only what was downloaded before",
    )  # fmt: skip


def _gated(repo: str, error: hub_errors.GatedRepoError) -> Problem:
    page = PAGE + repo
    if get_token() is None:
        got, mend = "no token on this machine", f"accept its conditions on {page}, then run: hf auth login"
    else:
        got = f"a token without access: {_server_words(error)}"
        mend = (
            f"request access on {page} with the account of the token (a fine-grained token also needs the permission "
            "to read public gated repositories), or use another token: hf auth login"
        )
    return Problem("the model is gated", repo, got, "a token whose account has access", mend)


def _no_repository(repo: str) -> Problem:
    page = PAGE + repo
    near = did_you_mean(repo, _similar(repo))
    if get_token() is None:
        got, mend = "no token on this machine", f"check the name on {page}; if it is private, run: hf auth login"
    else:
        got, mend = "a token", f"check the name on {page}; if it is private, the account of the token needs access"
    what = "no such model folder, and no such model on the Hub, or a private one"
    return Problem(what, repo, got, next_step=f"{near} {mend}".strip())


def _similar(repo: str) -> list[str]:
    """Public models of the same owner, else of a similar name; none where the Hub does not say."""
    owner, _, name = repo.partition("/")
    try:
        found = [model.id for model in api().list_models(author=owner, limit=500)]
        return found or [model.id for model in api().list_models(search=name, limit=50)]
    except (http.HTTPError, OSError, KeyError, TypeError):
        return []


def _no_revision(repo: str, revision: str | None) -> Problem:
    try:
        refs = api().list_repo_refs(repo)
        known = [ref.name for ref in (*refs.branches, *refs.tags)]
    except (http.HTTPError, OSError, KeyError):
        known = []
    near = did_you_mean(revision or "", known)
    expected = ", ".join(["a whole commit hash", *known[:20]])
    return Problem(f"the model has no revision {revision!r}", repo, expected=expected, next_step=near)


def _not_cached(repo: str, revision: str | None) -> Problem:
    what = f"revision {revision!r}" if revision else "the default branch"
    mend = f"download it: hf download {repo}" + (f" --revision {revision}" if revision else "")
    return Problem(
        "no such model folder, and the model was not downloaded before", repo,
        got=f"nothing of {what} in {constants.HF_HUB_CACHE}",
        next_step="HF_HUB_OFFLINE is set: unset it" if constants.is_offline_mode() else mend,
    )  # fmt: skip


def _refused(repo: str, error: hub_errors.HfHubHTTPError) -> Problem:
    status, words = error.response.status_code, _server_words(error)
    got = f"HTTP {status}: {words}"[:300]
    if status == 401:
        mend = "run: hf auth login (a token in HF_TOKEN wins over it; unset that one if it is old)"
        return Problem("the Hub does not know this token", repo, got, next_step=mend)
    if status == 403:
        mend = f"open {PAGE}{repo} with the account of the token; what a token may do: {PAGE}settings/tokens"
        return Problem("the token may not read this model", repo, got, next_step=mend)
    if status == 429:
        after = error.response.headers.get("Retry-After", "")
        mend = f"wait {after or 'some'} seconds and run the same command again"
        mend += "" if get_token() else "; with a token (hf auth login) the limits are higher"
        return Problem("too many requests to the Hub", repo, got, next_step=mend)
    mend = "run the same command again later; https://status.huggingface.co says whether the Hub is well"
    return Problem("the Hub does not answer as it should", repo, got, next_step=mend)


def _server_words(error: hub_errors.HfHubHTTPError) -> str:
    return " ".join((error.server_message or error.response.reason_phrase or "").split())


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts
