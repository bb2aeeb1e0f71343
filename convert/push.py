"""Publishes a checkpoint on the Hub: proved, with its card, in one commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from bitroute.convert.card import PICTURE, CardInputs, model_card
from bitroute.convert.files import sha256
from bitroute.convert.origin import CARD, base_repo, find_origin, is_gated
from bitroute.convert.quality import Quality, find_quality
from bitroute.convert.record import Record, read_record
from bitroute.convert.snippet import Trial, try_loading
from bitroute.convert.upload import Target, commit_files, find_target, open_target, stale_files
from bitroute.convert.verify import Verification, verify
from bitroute.convert.workers import run_all
from bitroute.errors import Problem, RecipeError, SourceError

RECORD = "bitroute.json"
Progress = Callable[[str], None]


def check_push(target: Target, base: str | None) -> bool | None:
    """Everything about the push that can be refused before there is a checkpoint; nothing is written.

    base: the model on the Hub that the checkpoint is, or will be, made from; None where it is not known.

    Returns:
        Whether the repository is private; None where it does not exist yet.

    Raises:
        RecipeError: every reason why not.
    """
    if base and base.lower() == target.repo.lower():
        what = "this repository holds the base model: publishing there would replace it"
        raise RecipeError(Problem(what, base, next_step="give another OWNER/NAME"))
    private = find_target(target)
    stays_private = target.private if private is None else private
    if base and not (stays_private or target.accept_license) and (gated := is_gated(base)) is not False:
        what = "the base model is gated" if gated else "the Hub does not say whether the base model is gated"
        mend = "read its licence; then give --accept-license if it lets you publish derivatives, or else --private"
        raise RecipeError(Problem(f"{what}: what is made of it is bound by its conditions", base, next_step=mend))
    return private


def check_folder(folder: Path, target: Target, base_model: str | None = None, report: Path | None = None) -> None:
    """Everything about `push` that can be refused in seconds; raises what it raises."""
    folder = Path(folder).expanduser()
    record = read_record(folder)
    _files(folder, record)
    find_quality(folder, report)
    check_push(target, base_repo(record, base_model))


def push(
    folder: Path, target: Target, *, base_model: str | None = None, report: Path | None = None,
    verification: Verification | None = None, progress: Progress | None = None,
) -> str:  # fmt: skip
    """Uploads a finished checkpoint and its card; the URL where it is.

    The files that its record lists go up, README.md, and the report's picture; nothing else that lies in the folder.

    base_model: the id on the Hub of a source that was a folder. report: the folder of its evaluation, by default
    FOLDER-report. verification: of the folder as it is now; without one it is verified here.
    progress: is told each stage, and lets the client draw its bars.

    Raises:
        SourceError: no finished checkpoint, it does not verify or load, or its report rejects it.
        RecipeError: as `check_push`. JobError: the upload failed; the same call goes on with it.
    """
    folder = Path(folder).expanduser()
    say = progress or (lambda what: None)
    record = read_record(folder)
    files = _files(folder, record)
    private = check_push(target, base_repo(record, base_model))
    quality, unevaluated = find_quality(folder, report)
    origin = find_origin(record, base_model)
    for note in filter(None, (unevaluated, origin.note)):
        say(f"note: {note}")
    verification = verification or _verify(folder, say)
    for note in verification.notes:
        say(f"note: {note}")
    trial = _prove(folder, record, verification, say)
    card = model_card(CardInputs(folder, record, origin, trial, quality), target.repo, _branch(target))
    contents: dict[str, str | bytes] = {**files, **_beside(card, quality)}
    parent = open_target(target, private is not None)
    stale = stale_files(target, parent, list(contents))
    for name in stale:
        say(f"removing {name}: weights of another checkpoint")
    say(f"uploading {len(contents)} files to {target.repo}")
    message = f"Upload a checkpoint quantized with bitroute {version('bitroute')}"
    return commit_files(target, parent, contents, stale, message, bars=progress is not None)


def _files(folder: Path, record: Record) -> dict[str, str]:
    """Name in the repository → path, of what the record lists and of itself; no name and no link leads outside."""
    place, found, problems = folder.resolve(), dict[str, str](), []
    for name in [*record.files, RECORD]:
        plain = PurePosixPath(name)
        hidden = any(part.startswith(".") for part in plain.parts)  # `..` among them
        if plain.parts and not plain.is_absolute() and not hidden and (folder / name).resolve().is_relative_to(place):
            found[name] = str(folder / name)
        else:
            problems.append(Problem(f"the record lists {name!r}, which is not in the folder", str(folder)))
    if problems:
        raise SourceError(problems[:20])
    return found


def _beside(card: str, quality: Quality | None) -> dict[str, str | bytes]:
    picture = {PICTURE: str(quality.picture)} if quality and quality.picture else {}
    return {CARD: card.encode(), **picture}


def _branch(target: Target) -> str | None:
    """What a loader has to be told; what is proposed in a pull request is meant for the default branch."""
    named = target.revision or "main"
    return None if named == "main" or named.startswith("refs/") else named


def _verify(folder: Path, say: Progress) -> Verification:
    say(f"verifying {folder}")
    return verify(folder)


def _prove(folder: Path, record: Record, given: Verification, say: Progress) -> Trial:
    if given.problems:
        raise SourceError(given.problems)
    say("loading the checkpoint in a fresh process")
    trial = try_loading(folder, record)
    if trial.problem:
        raise SourceError(trial.problem)
    _check_unchanged(folder, record, given)  # last, because what is sent is what was verified
    if trial.note:
        say(f"note: {trial.note}")
    return trial


def _check_unchanged(folder: Path, record: Record, given: Verification) -> None:
    """The verification is of this folder, and every byte is still as it was then."""
    expected: Mapping[str, str] = {**record.hashes, RECORD: given.record_sha256}
    names = [*record.files, RECORD]
    changed: list[str] = []

    def check(name: str) -> None:
        file = folder / name
        if not file.is_file() or sha256(file) != expected.get(name):
            changed.append(name)

    run_all(partial(check, name) for name in names)
    if changed or given.folder.resolve() != folder.resolve():
        got = ", ".join(sorted(changed)[:5]) or f"a verification of {given.folder}"
        mend = "verify it again, or convert it again"
        raise SourceError(Problem("the checkpoint changed after it was verified", str(folder), got, next_step=mend))
