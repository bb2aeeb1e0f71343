"""The Hub's write side through huggingface_hub: what an account may do, one commit of everything, plain words."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants, get_token
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging
from huggingface_hub.utils import httpx as http

from bitroute.convert.hub import TEMPORARY, TIMEOUT_S, api, explained, parse_hub_id
from bitroute.convert.selection import OTHER_WEIGHTS
from bitroute.errors import BitrouteError, JobError, Problem, RecipeError

SETTINGS = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Target:
    """Where a checkpoint goes, and on which terms."""

    repo: str  # owner/name
    private: bool = False
    revision: str | None = None  # a branch, made if it is missing, or refs/pr/N
    create_pr: bool = False
    accept_license: bool = False  # publish although the base model is gated


def find_target(target: Target) -> bool | None:
    """Whether the repository is private, or None where it does not exist yet; nothing is written.

    Raises:
        RecipeError: the account may not write it, the token or the words are not such as this needs,
            or the Hub cannot be asked.
    """
    if problems := [*_words(target)]:
        raise RecipeError(problems)
    with _writing(target.repo, RecipeError):
        account = api().whoami()
        private = _visibility(target.repo)
        if private is not None and not target.create_pr:
            api().auth_check(target.repo, write=True)
    if refusal := _refusal(target, account, private):
        raise RecipeError(refusal)
    return private


def stale_files(target: Target, commit: str, files: Sequence[str]) -> list[str]:
    """Weights and their indexes at that commit which the new files do not replace: loaders would mix them up."""
    with _writing(target.repo):
        there = api().list_repo_files(target.repo, revision=commit)
    return sorted(name for name in set(there) - {*files} if name.endswith(OTHER_WEIGHTS) or ".index." in name)


def open_target(target: Target, exists: bool) -> str:
    """Makes the repository and the branch where they are missing; the commit that the new one follows."""
    with _writing(target.repo):
        if not exists:
            api().create_repo(target.repo, private=target.private, exist_ok=True)
        if target.revision and not target.revision.startswith("refs/"):
            api().create_branch(target.repo, branch=target.revision, exist_ok=True)
        return api().model_info(target.repo, revision=target.revision, timeout=TIMEOUT_S).sha or ""


def commit_files(
    target: Target, parent: str, files: Mapping[str, str | bytes], stale: Sequence[str], message: str, bars: bool
) -> str:
    """All files in one commit, so that nobody loads a half of it; where it can be seen.

    What an earlier try has sent is not sent again. `upload_folder` is not used: with Xet it commits in several parts.

    files: name in the repository → a file's path, or its content. bars: the client's own, on a terminal.

    Raises:
        JobError: the upload failed, or somebody else committed meanwhile.
    """
    with _writing(target.repo), _bars(bars):
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        done = api().create_commit(
            target.repo, [*additions, *map(CommitOperationDelete, stale)], commit_message=message,
            revision=target.revision, create_pr=target.create_pr, parent_commit=parent,
        )  # fmt: skip
    place = f"{constants.ENDPOINT}/{target.repo}"
    return done.pr_url or (f"{place}/tree/{target.revision}" if target.revision else place)


def _visibility(repo: str) -> bool | None:
    try:
        return bool(api().model_info(repo, timeout=TIMEOUT_S).private)
    except hub_errors.GatedRepoError:
        return False
    except hub_errors.RepositoryNotFoundError:
        return None


def _words(target: Target) -> Iterator[Problem]:
    """What is wrong whatever the Hub says."""
    named = parse_hub_id(target.repo)
    if named is None or named[1]:
        yield Problem("not the name of a repository", got=target.repo, expected="OWNER/NAME")
    if target.create_pr and target.revision:
        mend = "leave one of them out; --revision refs/pr/N adds to a pull request that is open"
        yield Problem("a pull request is opened against the default branch", got=target.revision, next_step=mend)
    if re.fullmatch(r"[0-9a-f]{40}", target.revision or ""):
        yield Problem("a commit cannot be pushed to", got=str(target.revision), expected="a branch")
    if constants.is_offline_mode():
        yield Problem("the Hub cannot be written offline", target.repo, next_step="HF_HUB_OFFLINE is set: unset it")
    elif get_token() is None:
        mend = f"make a token that may write ({SETTINGS}), then run: hf auth login"
        yield Problem("no token on this machine", target.repo, next_step=mend)


def _refusal(target: Target, account: Mapping[str, Any], private: bool | None) -> Problem | None:
    owner, user = target.repo.partition("/")[0], str(account.get("name"))
    token: Mapping[str, Any] = (account.get("auth") or {}).get("accessToken") or {}
    owners = [user, *(str(group.get("name")) for group in account.get("orgs") or [])]
    if token.get("role") == "read":
        mend = f"make one that may write ({SETTINGS}), then run: hf auth login"
        return Problem("the token may only read", target.repo, f"a token of {user}", next_step=mend)
    if private is None and owner not in owners:
        expected = f"one of {', '.join(owners)}"
        return Problem(f"the account may not make repositories of {owner!r}", target.repo, user, expected)
    if target.private and private is False:
        mend = "make it private in its settings, push to another name, or leave --private out"
        return Problem("the repository exists and is public", target.repo, next_step=mend)
    return None


@contextmanager
def _writing(repo: str, kind: type[BitrouteError] = JobError) -> Iterator[None]:
    """Whatever the client raises becomes a `kind` that says what to do."""
    with explained(repo, None, kind):
        try:
            yield
        except (http.HTTPError, RuntimeError, ValueError, OSError) as error:
            if problem := _problem(repo, error):
                raise kind(problem) from error
            raise


def _problem(repo: str, error: BaseException) -> Problem | None:
    """None where the words of the read side fit."""
    again = "run the same command again: what has arrived is not sent twice"
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    got = " ".join(f"{type(cause).__name__}: {cause}".split())[:400]
    if isinstance(error, ValueError):
        return Problem("the Hub refuses what was sent", repo, got)
    if isinstance(cause, hub_errors.GatedRepoError | hub_errors.RepositoryNotFoundError):
        return None
    status = cause.response.status_code if isinstance(cause, hub_errors.HfHubHTTPError) else None
    if status == 403:
        mend = f"push to a repository of your own, give --create-pr, or see what the token may do: {SETTINGS}"
        return Problem("this account may not write the repository", repo, got, next_step=mend)
    if status in (409, 412):
        return Problem("somebody else changed the repository meanwhile", repo, got, next_step=again)
    if status is not None and (status not in TEMPORARY or status == 429):
        return None
    return Problem("the Hub cannot be reached, or the upload was interrupted", repo, got, next_step=again)


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """The client draws its own; on what is no terminal they would be a line for each step, and remarks besides."""
    before, verbosity = are_progress_bars_disabled(), logging.get_verbosity()
    if before or (shown and sys.stderr.isatty()):
        yield
        return
    disable_progress_bars()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        enable_progress_bars()
        logging.set_verbosity(verbosity)
