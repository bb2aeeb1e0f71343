"""The output folder: whose it is, and what of it may be replaced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from bitroute.convert.plan import WORKSPACE_BYTES, Plan
from bitroute.convert.reading import read_json
from bitroute.errors import Problem, RecipeError, SourceError

DONE, UNFINISHED = "bitroute.json", "bitroute.json.part"  # the record; it gets its final name last of all


@contextmanager
def claimed(plan: Plan, out: Path, names: Sequence[str], overwrite: bool) -> Iterator[None]:
    """The folder for one job at a time: new, empty, or an earlier output whose files `overwrite` removes.

    names: the files that the job will write.

    Raises:
        RecipeError: refused, and nothing was removed or written.
    """
    check_output(plan, out, names, overwrite)
    place = out.resolve()  # `.` has no name
    lock = FileLock(place.with_name(f".{place.name}.bitroute.lock"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        _clear(out, earlier_files(out))
    except Timeout:
        raise RecipeError(
            Problem("another job is writing this folder", str(out), next_step="wait for it, or give another --out")
        ) from None
    except OSError as error:
        lock.release()
        where = str(error.filename or out)
        raise RecipeError(Problem("the output folder cannot be written", where, got=error.strerror or "")) from error
    try:
        yield
    finally:
        lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)


def check_output(plan: Plan, out: Path, names: Sequence[str], overwrite: bool) -> None:
    """Everything about the output folder that can be refused before the job; changes nothing.

    Raises:
        RecipeError: it holds other files, is a file, is or holds the source, leads elsewhere through a link, or
            its disk is too full.
    """
    try:
        problem = _place_problem(plan, out, names) or _occupied(out, overwrite)
        earlier = [] if problem else earlier_files(out)
    except (OSError, RuntimeError, ValueError) as error:
        problem = Problem("not a usable output folder", str(out)[:200], got=str(error)[:200])
    if problem:
        raise RecipeError(problem)
    check_room(plan, out, sum(file.stat().st_size for file in earlier))


def earlier_files(out: Path) -> list[Path]:
    """The files that earlier jobs listed as their own and that are there, in the order in which to remove them.

    What makes a folder loadable goes first and the records last, so that an interrupted removal can be taken up.
    """
    marks = [mark for mark in (out / DONE, out / UNFINISHED) if mark.is_file()]
    listed = {file for mark in marks for file in _listed(mark)} - set(marks)
    return [*sorted(listed, key=lambda file: (file.name != "model_index.json", file)), *marks]


def check_room(plan: Plan, out: Path, freed_bytes: int = 0) -> None:
    """Raises RecipeError where the disk that holds `out` has less room than the plan writes.

    freed_bytes: what the job removes before it writes.
    """
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise RecipeError(Problem("the output folder cannot be written", str(out), got=f"{folder} is not writable"))
    free = shutil.disk_usage(folder).free + freed_bytes
    needed = plan.size_bytes + WORKSPACE_BYTES // 16
    if free < needed:
        raise RecipeError(
            Problem(
                "the disk is too full for this job", str(out), got=f"{free / 1e9:.2f} GB free",
                expected=f"{needed / 1e9:.2f} GB", next_step="free some room, or give --out on another disk",
            )
        )  # fmt: skip


def _place_problem(plan: Plan, out: Path, names: Sequence[str]) -> Problem | None:
    source, place = plan.pipeline.folder.resolve(), out.resolve()
    if place == source or source in place.parents:
        return Problem("the output folder lies in the source model", str(out), next_step="give another --out")
    if place in source.parents:
        return Problem("the source model lies in the output folder", str(out), next_step="give another --out")
    if out.exists() and not out.is_dir():
        return Problem("the output is a file", str(out), next_step="give a folder as --out")
    for folder in sorted({(out / name).parent for name in names}):
        if folder != out and (folder.is_symlink() or (folder.exists() and not folder.is_dir())):
            return Problem(
                "a folder to write is a link or a file", str(folder), next_step="remove it, or give another --out"
            )
    return None


def _occupied(out: Path, overwrite: bool) -> Problem | None:
    if not out.is_dir() or not any(out.iterdir()):
        return None
    ours = any((out / mark).is_file() for mark in (DONE, UNFINISHED))
    if ours and overwrite:
        return None
    return Problem(
        "the output folder is not empty", str(out), got="an earlier output of bitroute" if ours else "other files",
        next_step="give --overwrite (overwrite=True in Python) to replace it" if ours else "give another --out",
    )  # fmt: skip


def _listed(mark: Path) -> Iterator[Path]:
    """Regular files inside the folder only, finished or not."""
    try:
        names = read_json(mark).get("files", [])
    except SourceError:
        if mark.name != UNFINISHED:
            raise
        names = []  # that job ended while it wrote its first file, this one
    inside = mark.parent.resolve()
    for name in names if isinstance(names, list) else []:
        for file in (mark.parent / str(name), mark.parent / f"{name}.part"):
            try:
                if inside in file.resolve().parents and file.is_file() and not file.is_symlink():
                    yield file
            except (OSError, ValueError):  # a name that no file system takes was written by no job
                continue


def _clear(out: Path, files: Sequence[Path]) -> None:
    """The files, and the folders that this empties."""
    for file in files:
        file.unlink()
    for folder in sorted({file.parent for file in files} - {out}, reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
