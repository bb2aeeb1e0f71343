"""The files of a pipeline that go along untouched."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from bitroute.convert.bare import goes_along
from bitroute.convert.checkpoint import Pipeline, file_names
from bitroute.convert.layout import read_header
from bitroute.errors import Problem, SourceError

WEIGHTS = (".safetensors", ".bin", ".index.json", ".msgpack", ".h5", ".ckpt", ".pt", ".onnx")
BESIDE = ("LICENSE", "LICENCE", "NOTICE")  # beside the index; the model card speaks of the original and stays there


def copies(pipeline: Pipeline, converted: Sequence[str]) -> tuple[dict[str, int], list[Problem]]:
    """File relative to the pipeline folder → bytes, and every reason why the copy would not be whole.

    converted: the parts that the job writes itself; of those only what is neither weights nor config goes along, and
    the folders inside. Hidden files never do: tools leave them, no loader reads them.
    """
    problems = [_missing(pipeline, name) for name in pipeline.wanted if not pipeline.place(name).is_dir()]
    empty = [n for n in pipeline.components if n not in pipeline.held and not _has_weights(pipeline.place(n))]
    problems += [_no_weights(pipeline, name) for name in empty]
    found: dict[str, int] = {}
    for file in sorted(_files(pipeline, converted, problems)):
        if os.path.isfile(file):
            found[file.relative_to(pipeline.folder).as_posix()] = file.stat().st_size
            problems += _damage(file)
        else:
            problems.append(_unreadable(file))
    return found, problems


def _files(pipeline: Pipeline, converted: Sequence[str], problems: list[Problem]) -> Iterator[Path]:
    from bitroute.convert.selection import other_variants

    for folder in () if pipeline.bare else (pipeline.folder / name for name in pipeline.parts):
        files = list(walk(folder, problems))
        left_out = other_variants([file.name for file in files if file.parent == folder])
        for file in files:
            written = file.name == "config.json" or file.name.endswith(WEIGHTS) or is_index(file.name)
            ours = folder.name in converted and written
            if not (file.parent == folder and (ours or file.name in left_out)):
                yield file
    names, index = file_names(pipeline.folder), pipeline.index
    own = [name for name in names if goes_along(name, index)] if pipeline.bare else []
    beside = [name for name in names if name in own or name.upper().startswith(BESIDE)]
    yield from (pipeline.folder / name for name in beside if not (pipeline.folder / name).is_dir())


def walk(top: Path, problems: list[Problem]) -> Iterator[Path]:
    """What lies in a folder and below it, and is no folder; those that cannot be walked are problems."""
    folders = [top]
    while folders:
        folder = folders.pop()
        try:
            names = file_names(folder)
        except SourceError as error:
            problems += error.problems
            continue
        for path in (folder / name for name in names if not name.startswith(".")):
            if not os.path.isdir(path):
                yield path
            elif path.is_symlink():  # it may lead out of the model, or into itself
                problems.append(_linked(path))
            else:
                folders.append(path)


def is_index(name: str) -> bool:
    """Of shards, whatever their variant: `model.safetensors.index.fp16.json`."""
    return name.endswith(".json") and ".index." in name


def _has_weights(folder: Path) -> bool:
    return any(file.name.endswith(WEIGHTS) and file.is_file() for file in folder.iterdir())


def _damage(file: Path) -> Sequence[Problem]:
    """What the headers tell of weights that are copied without being read: a download may have ended early."""
    if file.name.endswith(".safetensors"):
        try:
            read_header(file)
        except SourceError as error:
            return error.problems
    elif file.name.endswith(WEIGHTS) and not file.stat().st_size:
        return [Problem("a weight file is empty", str(file), next_step="download the model again")]
    return []


def _missing(pipeline: Pipeline, name: str) -> Problem:
    return Problem(
        f"the pipeline names a part {name!r} that is not there", str(pipeline.folder / "model_index.json"),
        next_step="download the model again",
    )  # fmt: skip


def _no_weights(pipeline: Pipeline, name: str) -> Problem:
    return Problem(
        f"component {name!r} has no weights", str(pipeline.place(name)),
        got="no weight file, or links that lead nowhere", next_step="download the model again",
    )  # fmt: skip


def _linked(folder: Path) -> Problem:
    return Problem(
        "a link to a folder is not copied", str(folder), got=f"a link to {os.readlink(folder)}",
        next_step="put the folder itself there",
    )  # fmt: skip


def _unreadable(file: Path) -> Problem:
    got = "a link that leads nowhere" if file.is_symlink() else "neither a file nor a folder"
    return Problem("cannot copy what is no file", str(file), got=got, next_step="download the model again")
