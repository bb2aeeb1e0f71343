"""Scores of single pictures from plug-ins, such as the CLIP score: the candidate's beside the original's.

A plug-in runs in a process of its own, and what it found is kept in the folder of the pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from os.path import exists
from pathlib import Path
from typing import Any

from bitroute.convert.reading import read_json
from bitroute.errors import JobError, Problem, RecipeError, SourceError
from bitroute.eval.apart import run_apart
from bitroute.eval.intervals import compare
from bitroute.eval.plugin import Chosen, find
from bitroute.eval.sampling import Sample

__all__ = ["Chosen", "check", "parse_score", "parse_scores", "standalone"]

Json = dict[str, Any]


def parse_score(text: str) -> Chosen:
    """`clip=./clip-vit-base-patch16` → the installed score `clip` and its argument; the plug-in is not imported.

    Raises:
        RecipeError: no such score is installed.
    """
    name, _, argument = text.partition("=")
    find(name)
    return Chosen(name, argument or None)


def parse_scores(texts: Iterable[str]) -> tuple[Chosen, ...]:
    """As `parse_score`; raises RecipeError also where two would have one name in the report."""
    chosen = tuple(parse_score(text) for text in texts)
    labels = [choice.label for choice in chosen]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise RecipeError(Problem("two scores of one name", "--score", got=twice[0], expected="different scores"))
    return chosen


def check(chosen: Chosen) -> None:
    """Builds the score once, so that one that cannot be built is found before pictures are drawn.

    Raises:
        JobError: it cannot be imported or built, with what it said.
    """
    _run(chosen, Path(chosen.argument or chosen.name), [], None)


def standalone(chosen: Sequence[Chosen], original: Path, candidate: Path, samples: Sequence[Sample]) -> dict[str, Json]:
    """The report's `standalone` (docs/report.md); the difference is candidate minus original, paired.

    original, candidate: folders with `<sample>.png`, where the scores are kept too.

    Raises:
        JobError: a plug-in fails, with what it said, or a picture cannot be read.
    """
    return {choice.label: _describe(choice, original, candidate, samples) for choice in chosen}


def _describe(chosen: Chosen, original: Path, candidate: Path, samples: Sequence[Sample]) -> Json:
    first, second = (_judge_apart(chosen, folder, samples) for folder in (original, candidate))
    difference = compare(second["values"], first["values"], [sample.prompt_index for sample in samples])
    return {
        "title": first["title"], "higher_is_better": first["higher_is_better"],
        "original": sum(first["values"]) / len(samples), "candidate": sum(second["values"]) / len(samples),
        "difference": asdict(difference.mean), "p": difference.p,
    }  # fmt: skip


def _judge_apart(chosen: Chosen, folder: Path, samples: Sequence[Sample]) -> Json:
    """What `judge` says of the folder's pictures, now or in an earlier run."""
    try:
        file = folder / f"score-{_key(chosen, folder, samples)}.json"
    except OSError as error:
        raise JobError(Problem("cannot score the pictures", str(folder), got=str(error))) from error
    try:
        return read_json(file)
    except SourceError:  # not there, or damaged
        _run(chosen, folder, samples, file)
        return read_json(file)


def _key(chosen: Chosen, folder: Path, samples: Sequence[Sample]) -> str:
    """Of everything that decides the scores: plug-in, version, argument and the files that it names, pictures."""
    pictures = [[sample.prompt, *_identity(_picture(folder, sample))] for sample in samples]
    parts = [chosen.name, _distribution(chosen), list(_named_files(chosen.argument or "")), pictures]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _named_files(argument: str) -> Iterator[Any]:
    """The argument and, where it is a path, its place and the files there: another model may come under its name."""
    yield argument
    if exists(argument):
        path = Path(argument).resolve()
        yield str(path)
        yield from ([file.name, *_identity(file)] for file in (sorted(path.iterdir()) if path.is_dir() else [path]))


def _identity(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _picture(folder: Path, sample: Sample) -> Path:
    return folder / f"{sample.stem}.png"


def _distribution(chosen: Chosen) -> str:
    """`bitroute 0.1.0`"""
    distribution = find(chosen.name).dist
    return f"{distribution.name} {distribution.version}" if distribution else "an unknown package"


def _run(chosen: Chosen, folder: Path, samples: Sequence[Sample], file: Path | None) -> None:
    pictures = [[str(_picture(folder, sample)), sample.prompt] for sample in samples]
    request = {**asdict(chosen), "pictures": pictures, "file": str(file) if file else None}
    failed = f"the score {chosen.name!r} of {_distribution(chosen)} cannot be computed"
    run_apart("bitroute.eval.plugin", request, failed, folder)
    if file and not file.is_file():
        raise JobError(Problem(failed, str(folder), got="its process ended before it had written the scores"))
