"""The files of a pipeline that go along untouched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from bitroute.convert.checkpoint import Pipeline
from bitroute.errors import Problem

WEIGHTS = (".safetensors", ".bin", ".index.json", ".msgpack", ".h5", ".ckpt", ".pt", ".onnx")
BESIDE = ("LICENSE", "LICENCE", "NOTICE")  # beside the index; the model card speaks of the original and stays there


def copies(pipeline: Pipeline, converted: Sequence[str]) -> tuple[dict[str, int], list[Problem]]:
    """File relative to the pipeline folder → bytes, and every reason why the copy would not be whole.

    converted: the parts that the job writes itself; of those only what is neither weights nor config goes along.
    """
    problems = [_missing(pipeline, name) for name in pipeline.wanted if not (pipeline.folder / name).is_dir()]
    empty = [name for name in pipeline.components if not _has_weights(pipeline.folder / name)]
    problems += [_no_weights(pipeline, name) for name in empty]
    found: dict[str, int] = {}
    for file in sorted(_files(pipeline, converted)):
        if file.is_file():
            found[file.relative_to(pipeline.folder).as_posix()] = file.stat().st_size
        elif not file.is_dir():
            problems.append(_unreadable(file))
    return found, problems


def _files(pipeline: Pipeline, converted: Sequence[str]) -> Iterator[Path]:
    for name in pipeline.parts:
        if name not in converted:
            yield from (pipeline.folder / name).rglob("*")
    for name in converted:
        own = (pipeline.folder / name).iterdir()
        yield from (file for file in own if file.name != "config.json" and not file.name.endswith(WEIGHTS))
    yield from (file for file in pipeline.folder.iterdir() if file.name.upper().startswith(BESIDE))


def _has_weights(folder: Path) -> bool:
    return any(file.name.endswith(WEIGHTS) and file.is_file() for file in folder.iterdir())


def _missing(pipeline: Pipeline, name: str) -> Problem:
    return Problem(
        f"the pipeline names a part {name!r} that is not there", str(pipeline.folder / "model_index.json"),
        next_step="download the model again",
    )  # fmt: skip


def _no_weights(pipeline: Pipeline, name: str) -> Problem:
    return Problem(
        f"component {name!r} has no weights", str(pipeline.folder / name),
        got="no weight file, or links that lead nowhere", next_step="download the model again",
    )  # fmt: skip


def _unreadable(file: Path) -> Problem:
    got = "a link that leads nowhere" if file.is_symlink() else "neither a file nor a folder"
    return Problem("cannot copy what is no file", str(file), got=got, next_step="download the model again")
