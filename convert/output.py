"""The output folder: whose it is, in which state it was left, and what of it may be replaced."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import Timeout

from bitroute.convert.bare import CONFIG, INDEX
from bitroute.convert.files import held, make_folder, sync, take_lock
from bitroute.convert.journal import DONE, DRAFT, UNFINISHED, Journal, read_journal
from bitroute.convert.plan import WORKSPACE_BYTES, Plan
from bitroute.convert.reading import read_json
from bitroute.errors import Problem, RecipeError, SourceError

ANEW = "give --overwrite (overwrite=True in Python) to replace it"


@contextmanager
def claimed(plan: Plan, out: Path, journal: Journal, overwrite: bool, resume: bool) -> Iterator[None]:
    """The folder for one job at a time: new, empty, an output to replace, or an unfinished one to resume.

    Raises:
        RecipeError: refused, and nothing was removed or written.
    """
    check_output(plan, out, journal, overwrite, resume)
    with _locked(out):
        check_output(plan, out, journal, overwrite, resume)  # another job may have ended in between
        yield


def begin(out: Path, journal: Journal, resume: bool) -> Journal | None:
    """Makes a claimed folder ready: the journal to go by, or None where nothing is left to do.

    Whatever moment this is interrupted at, the folder has a journal or a record of all that lies in it.
    """
    if resume and is_finished(out):
        for name in (UNFINISHED, DRAFT):
            (out / name).unlink(missing_ok=True)
        return None
    found = read_journal(out / UNFINISHED) if resume else None
    if found is None:
        names = {**listed_files(out), **dict.fromkeys(journal.files)} if any(out.iterdir()) else ()
        found = replace(journal, earlier=tuple(names))
        found.write(out)
    if found.earlier:
        _clear(out, found.earlier)
        found = replace(found, earlier=())
        found.write(out)
    for file in existing(out, {f"{name}.part" for name in found.files} - {*found.files, UNFINISHED}):
        file.unlink()
    return found


def check_output(plan: Plan, out: Path, journal: Journal, overwrite: bool, resume: bool) -> None:
    """Everything about the output folder that can be refused before the job; changes nothing.

    Raises:
        RecipeError: it holds other files, is a file, is or holds the source, leads elsewhere through a link,
            cannot be resumed, or its disk is too full.
    """
    try:
        place = _place_problem(plan, out, journal.files)
        problems = [place] if place else _occupied(out, journal, overwrite, resume)
        there_bytes = 0 if problems else sum(existing(out, listed_files(out)).values())
    except (OSError, RuntimeError, ValueError) as error:
        problems = [Problem("not a usable output folder", str(out)[:200], got=str(error)[:200])]
    if problems:
        raise RecipeError(problems)
    if not (resume and is_finished(out)):
        check_room(plan, out, there_bytes)


def is_finished(out: Path) -> bool:
    """The record has its name, and no job has begun to replace it."""
    journal = read_journal(out / UNFINISHED) if (out / DONE).is_file() else None
    return (out / DONE).is_file() and not (journal and journal.earlier)


def listed_files(out: Path) -> dict[str, None]:
    """The names that the folder's record and journal list, finished or not, what makes a folder loadable first."""
    found = [name for mark in (DONE, UNFINISHED) if (out / mark).is_file() for name in _listed(out / mark)]
    names = {*found, *(f"{name}.part" for name in found)} - {UNFINISHED}
    return dict.fromkeys(sorted(names, key=lambda name: (name != DONE, name not in (INDEX, CONFIG), name)))


def existing(out: Path, names: Iterable[str]) -> dict[Path, int]:
    """Those that are regular files inside the folder, and their bytes."""
    found = {}
    for file in _inside(out, names):
        with suppress(OSError):
            info = file.lstat()
            if stat.S_ISREG(info.st_mode):
                found[file] = info.st_size
    return found


def check_room(plan: Plan, out: Path, there_bytes: int = 0) -> None:
    """Raises RecipeError where the disk that holds `out` has less room than the plan writes.

    there_bytes: what the job finds done, or removes before it writes.
    """
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise RecipeError(Problem("the output folder cannot be written", str(out), got=f"{folder} is not writable"))
    free = shutil.disk_usage(folder).free + there_bytes
    needed = plan.size_bytes + WORKSPACE_BYTES // 16
    if free < needed:
        raise RecipeError(
            Problem(
                "the disk is too full for this job", str(out), got=f"{free / 1e9:.2f} GB free",
                expected=f"{needed / 1e9:.2f} GB", next_step="free some room, or give --out on another disk",
            )
        )  # fmt: skip


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    try:
        make_folder(out)
        lock = take_lock(out)
    except Timeout:
        raise RecipeError(
            Problem("another job is writing this folder", str(out), next_step="wait for it, or give another --out")
        ) from None
    except OSError as error:
        where = str(error.filename or out)
        raise RecipeError(Problem("the output folder cannot be written", where, got=error.strerror or "")) from error
    with held(lock):
        yield


def _place_problem(plan: Plan, out: Path, names: Sequence[str]) -> Problem | None:
    source, place = plan.pipeline.folder.resolve(), out.resolve()
    if plan.pipeline.variant:  # that is a folder of links
        source = Path(plan.pipeline.name).expanduser().resolve()
    if place == source or source in place.parents:
        return Problem("the output folder lies in the source model", str(out), next_step="give another --out")
    single = [Path(plan.pipeline.name).expanduser().resolve()] if plan.pipeline.config else []
    if any(place in path.parents for path in (source, *single)):
        return Problem("the source model lies in the output folder", str(out), next_step="give another --out")
    if out.exists() and not out.is_dir():
        return Problem("the output is a file", str(out), next_step="give a folder as --out")
    for folder in sorted({(out / name).parent for name in names}):
        if folder != out and (folder.is_symlink() or (folder.exists() and not folder.is_dir())):
            return Problem(
                "a folder to write is a link or a file", str(folder), next_step="remove it, or give another --out"
            )
    return None


def _occupied(out: Path, journal: Journal, overwrite: bool, resume: bool) -> list[Problem]:
    if overwrite and resume:
        return [Problem("resume and overwrite exclude each other", str(out))]
    if not out.is_dir() or not {file.name for file in out.iterdir()} - {DRAFT}:
        return []
    if not any((out / mark).is_file() for mark in (DONE, UNFINISHED)):
        return [_not_empty(out, "other files", "give another --out")]
    if resume:
        return _not_resumable(out, journal)
    if overwrite:
        return []
    if is_finished(out):
        return [_not_empty(out, "an earlier output of bitroute", ANEW)]
    mend = f"give --resume (resume=True in Python) to finish it, or {ANEW.removeprefix('give ')}"
    return [_not_empty(out, "an unfinished output of bitroute", mend)]


def _not_empty(out: Path, got: str, next_step: str) -> Problem:
    return Problem("the output folder is not empty", str(out), got=got, next_step=next_step)


def _not_resumable(out: Path, journal: Journal) -> list[Problem]:
    """Every reason why what is there is not the beginning, or the whole, of this job's output."""
    finished = is_finished(out)
    found = read_journal(out / (DONE if finished else UNFINISHED))
    if found is None or not (finished or found.source):
        got = "a record that was changed" if finished else "no journal that tells what it was made from"
        return [Problem("this output cannot be resumed", str(out), got=got, next_step=ANEW)]
    problems = found.changes(journal)[:20]
    return [*problems[:-1], *(replace(last, next_step=f"undo that, or {ANEW}") for last in problems[-1:])]


def _listed(mark: Path) -> list[str]:
    try:
        content: dict[str, Any] = read_json(mark)
    except SourceError:
        if mark.name != UNFINISHED:
            raise
        return []  # a damaged journal: its files stay
    resume = content.get("resume")
    lists = [content.get("files"), resume.get("earlier") if isinstance(resume, dict) else None]
    return [str(name) for names in lists if isinstance(names, list) for name in names]


def _clear(out: Path, names: Sequence[str]) -> None:
    """The files, and the folders that this empties; on the disk before it returns."""
    for file in existing(out, names):
        file.unlink()
    folders = {folder for file in _inside(out, names) for folder in file.parents} - {out, *out.parents}
    for folder in sorted(folders, reverse=True):
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()
        sync(folder)
    sync(out)


def _inside(out: Path, names: Iterable[str]) -> Iterator[Path]:
    """By their names, and by where links lead; a name that no file system takes was written by no job."""
    place = out.resolve()
    for name in names:
        with suppress(OSError, RuntimeError, ValueError):
            if ".." not in Path(name).parts and place in (out / name).resolve().parents:
                yield out / name
