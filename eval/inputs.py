"""Pictures that a pipeline is given: `image=photo.png` for all prompts, `mask_image=masks/` with one for each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageOps, ImageSequence

from bitroute.errors import JobError, Problem, RecipeError

Files = Mapping[str, Sequence[str]]  # argument → its picture files: one for all prompts, or one per prompt
Given = Image.Image | list[Image.Image]


def parse_inputs(texts: Sequence[str], prompts: int) -> dict[str, tuple[str, ...]]:
    """From ARGUMENT=FILE and ARGUMENT=FOLDER texts; an argument may come several times, its files in that order.

    prompts: how many there are; an argument has one picture, or as many as that. A folder stands for its pictures
    in the order of their names.

    Raises:
        RecipeError: all texts that are none, files that are missing or no pictures, wrong counts.
    """
    found: dict[str, list[str]] = {}
    problems = []
    for text in texts:
        argument, _, place = text.partition("=")
        if not argument.isidentifier() or not place:
            problems.append(
                Problem("not an input", "--input", got=repr(text[:200]), expected="ARGUMENT=FILE_OR_FOLDER")
            )
            continue
        files = _files(Path(place).expanduser())
        problems += [problem for file in files if (problem := _problem(argument, file))]
        found.setdefault(argument, []).extend(files)
    problems += [
        _wrong_count(name, len(files), prompts) for name, files in found.items() if len(files) not in (1, prompts)
    ]
    if problems:
        raise RecipeError(problems)
    return {argument: tuple(files) for argument, files in found.items()}


def _files(place: Path) -> list[str]:
    """Absolute, so that another process finds them."""
    path = Path(os.path.abspath(place))
    if not os.path.isdir(path):
        return [str(path)]
    known = Image.registered_extensions()
    return [str(path / name) for name in sorted(os.listdir(path)) if Path(name).suffix.lower() in known]


def _problem(argument: str, file: str) -> Problem | None:
    if not os.path.isfile(file):
        return Problem("no such picture", "--input", got=f"{argument}={file}"[:300], expected="a file or a folder")
    try:
        open_input(file)
    except JobError as error:
        return Problem(
            "this is not a picture", "--input", got=error.problems[0].got, expected="a file that Pillow reads"
        )
    return None


def _wrong_count(argument: str, pictures: int, prompts: int) -> Problem:
    expected = "one picture for all prompts" + (f", or {prompts}: one for each" if prompts > 1 else "")
    return Problem(f"wrong number of pictures for {argument!r}", "--input", got=str(pictures), expected=expected)


def open_input(file: str) -> Given:
    """RGB, turned as its EXIF data says; the list of its frames where the file is an animation.

    Raises:
        JobError: it is missing or damaged.
    """
    try:
        with Image.open(file) as image:
            frames = [ImageOps.exif_transpose(frame).convert("RGB") for frame in ImageSequence.Iterator(image)]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(Path(file).parent), "…")  # it may get into a report, which is published
        raise JobError(Problem("an input picture cannot be read", Path(file).name, got=reason[:300])) from error
    return frames if len(frames) > 1 else frames[0]


def inputs_for(files: Files, prompt_index: int) -> dict[str, Given]:
    """The pictures of one prompt, by argument."""
    chosen = {argument: paths[prompt_index if len(paths) > 1 else 0] for argument, paths in files.items()}
    return {argument: open_input(path) for argument, path in chosen.items()}


def names(files: Files) -> dict[str, list[str]]:
    """Without the folders of this machine: reports are published."""
    return {argument: [Path(path).name for path in paths] for argument, paths in files.items()}


def hashes(files: Files) -> dict[str, list[str]]:
    """SHA-256 of each file's bytes.

    Raises:
        JobError: a file cannot be read.
    """
    try:
        return {name: [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in p] for name, p in files.items()}
    except OSError as error:
        name = Path(str(error.filename)).name
        problem = Problem("an input picture cannot be read", name, got=error.strerror or str(error))
        raise JobError(problem) from error
