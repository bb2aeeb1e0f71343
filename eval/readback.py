"""report.json read back. A stranger may have edited it: what cannot be trusted is refused, all problems at once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    ValidationError,
)  # fmt: skip
from pydantic_core import ErrorDetails

from bitroute.convert.document import printable, shown, sorted_problems
from bitroute.convert.reading import read_json
from bitroute.errors import Problem, SourceError
from bitroute.eval.evaluate import distinct_names
from bitroute.eval.report import SCHEMA
from bitroute.eval.sampling import SEED_LIMIT, Sample, Sampling
from bitroute.eval.scores import HIGHER_IS_BETTER, plain

LARGEST = 1e30  # of a number in a report: sums of squares stay finite
IDENTICAL = "identical"


def _from_word(value: object) -> object:
    return math.inf if value == IDENTICAL else value


def _bounded(value: float) -> float:
    if abs(value) <= LARGEST or value == math.inf:
        return value
    raise ValueError(f'a number, or "{IDENTICAL}"')


Count = Annotated[int, Field(ge=0, le=2**53)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Score = Annotated[
    float, BeforeValidator(_from_word), AfterValidator(_bounded), PlainSerializer(plain, when_used="json")
]  # infinite where the pictures are identical  # fmt: skip


class _Part(BaseModel):
    """Keys that are not named are dropped."""

    model_config = ConfigDict(strict=True, frozen=True)


class StoredMean(_Part):
    value: Score
    low: Score | None
    high: Score | None
    prompts: Count


class StoredSummary(_Part):
    mean: StoredMean
    median: Score
    tail: Score
    worst: list[Annotated[tuple[Count, Score], Field(strict=False)]]
    identical: Count
    of_mse: StoredMean | None = None


Summaries = dict[str, StoredSummary]


class StoredSample(_Part):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Score] = Field(init=False)

    prompt: str
    seed: Count
    picture: str

    @property
    def scores(self) -> Mapping[str, float]:
        return self.__pydantic_extra__


class PromptError(_Part):
    prompt: Count
    relative_error: Annotated[Number, Field(ge=0)]


class StoredTrajectory(_Part):
    prompts: list[PromptError] = []


class StoredLimit(_Part):
    limit: str
    mean: Score | None
    holds: bool


class StoredCandidate(_Part):
    name: Annotated[str, Field(min_length=1)]
    verdict: str
    passed: bool
    closeness: Literal["", "identical", "indistinguishable"]
    tripwires: list[str]
    gate: list[StoredLimit]
    size_bytes: Count
    bits_per_weight: dict[str, Annotated[Number, Field(ge=0)]]
    parameters: dict[str, Count] = {}
    pictures: str
    scores: Summaries
    samples: list[StoredSample]
    trajectory: StoredTrajectory | None = None

    @property
    def judged(self) -> bool:
        """It has scores, and nothing says that they mean nothing."""
        return bool(self.scores) and not self.tripwires

    def values(self, metric: str) -> list[float]:
        """One for each sample; infinite where the pictures are identical."""
        return [sample.scores[metric] for sample in self.samples]


class StoredOriginal(_Part):
    name: str
    size_bytes: Count
    pictures: str
    pictures_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StoredSampling(_Part):
    prompts: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=SEED_LIMIT)]], Field(min_length=1)]
    call: dict[str, JsonValue]
    device: str
    threads: Count
    attention: str
    pipeline: str | None
    inputs: dict[str, list[str]]
    inputs_sha256: dict[str, list[str]] = {}

    def samples(self) -> list[Sample]:
        return list(Sampling(tuple(self.prompts), tuple(self.seeds)).samples())


class StoredReport(_Part):
    original: StoredOriginal
    sampling: StoredSampling
    floor: Annotated[dict[str, Summaries], Field(min_length=1)]
    unrelated_lpips: Number | None
    notes: list[str]
    candidates: Annotated[list[StoredCandidate], Field(min_length=1)]


@dataclass(frozen=True)
class Report:
    """name: the folder's name, with its parents' where two are called alike."""

    name: str
    folder: Path
    content: StoredReport


def read_reports(paths: Sequence[Path]) -> list[Report]:
    """Each path is a report's folder or its report.json; a report that is given twice counts once.

    Raises:
        SourceError: with everything that is wrong: no report, not one of this schema, pictures missing, or reports
            whose candidates cannot be compared because the originals or the samplings differ.
    """
    files = {os.path.realpath(file): file for file in map(_file, paths)}
    folders = {Path(os.path.abspath(file.parent)): file for file in files.values()}
    names = {folder: name for name, folder in distinct_names(folders).items()}
    reports, problems = list[Report](), list[Problem]()
    for file in files.values():
        try:
            content = read_report(file)
            reports.append(Report(names[Path(os.path.abspath(file.parent))], file.parent, content))
        except SourceError as error:
            problems += error.problems
    problems += [problem for report in reports[1:] for problem in _differences(reports[0], report)]
    if problems:
        raise SourceError(sorted_problems(problems))
    return reports


def read_report(file: Path) -> StoredReport:
    """One report, whose pictures are there; raises as `read_reports` does."""
    if not os.path.exists(file):
        expected, mend = "the folder of a report, or its report.json", "`quantize eval` writes reports"
        raise SourceError(Problem("no report here", str(file), expected=expected, next_step=mend))
    content = read_json(file)
    if content.get("schema") != SCHEMA:
        raise SourceError(Problem("not a report of this kind", str(file), shown(content.get("schema")), SCHEMA))
    _check_plain(content, file)
    try:
        report = StoredReport.model_validate(content)
    except ValidationError as error:
        raise SourceError([_problem(detail, file) for detail in error.errors(include_url=False)]) from None
    problems = [*_contradictions(report), *_bad_pictures(report, file.parent)]
    if problems:
        mend = "evaluate again, or fetch the whole folder again"
        raise SourceError([Problem(what, str(file), next_step=mend) for what in problems])
    return report


def _check_plain(content: Mapping[str, Any], file: Path) -> None:
    """Raises SourceError for what Python reads and JSON has not: NaN, infinities, halves of characters."""
    try:
        json.dumps(content, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        what, expected = "holds what is no JSON", "finite numbers and whole characters"
        raise SourceError(Problem(what, str(file), str(error)[:200], expected)) from None


def _file(path: Path) -> Path:
    return path / "report.json" if os.path.isdir(path) else path


def _problem(detail: ErrorDetails, file: Path) -> Problem:
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{printable(part)[:80]}" for part in detail["loc"])
    if detail["type"] == "missing":
        return Problem(f"{key[1:]} is missing", str(file), next_step="evaluate again with this version of bitroute")
    expected = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return Problem(f"{key[1:]} is not valid", str(file), got=shown(detail["input"]), expected=expected)


def _contradictions(report: StoredReport) -> Iterator[str]:
    """What the schema cannot say: parts that do not belong together."""
    for what, summaries in report.floor.items():
        yield from _bad_scores({m: s.mean.value for m, s in summaries.items()}, f"floor.{printable(what)[:80]}")
    names = [candidate.name for candidate in report.candidates]
    if len(set(names)) < len(names):
        yield "two candidates have one name"
    drawn = [(sample.prompt, sample.seed, f"{sample.stem}.png") for sample in report.sampling.samples()]
    for index, candidate in enumerate(report.candidates):
        where = f"candidates[{index}]"
        if candidate.scores:
            means = {metric: summary.mean.value for metric, summary in candidate.scores.items()}
            yield from _bad_scores(means, f"{where}.scores")
        if (candidate.scores or candidate.samples) and [
            (s.prompt, s.seed, s.picture) for s in candidate.samples
        ] != drawn:
            yield f"{where}.samples are not those of the sampling"
        for number, sample in enumerate(candidate.samples):
            yield from _bad_scores(sample.scores, f"{where}.samples[{number}]")
        yield from _bad_trajectory(candidate, len(report.sampling.prompts), where)


def _bad_scores(values: Mapping[str, float], where: str) -> Iterator[str]:
    yield from (f"{where}.{metric} is missing" for metric in HIGHER_IS_BETTER if metric not in values)
    infinite = [metric for metric, value in values.items() if metric != "psnr" and math.isinf(value)]
    yield from (f"{where}.{printable(metric)[:80]} is not a number" for metric in infinite)


def _bad_trajectory(candidate: StoredCandidate, prompts: int, where: str) -> Iterator[str]:
    if candidate.trajectory is None:
        return
    found = [error.prompt for error in candidate.trajectory.prompts]
    if len(set(found)) < len(found) or any(prompt >= prompts for prompt in found):
        yield f"{where}.trajectory.prompts are not those of the sampling"


def _bad_pictures(report: StoredReport, root: Path) -> Iterator[str]:
    """One sentence for each folder in which a picture is missing or is none; only the pictures' heads are read."""
    folders = [report.original.pictures, *(c.pictures for c in report.candidates if c.samples)]
    names = [f"{sample.stem}.png" for sample in report.sampling.samples()]
    for folder in folders:
        bad = [f"{name} {why}" for name in names if (why := _why_no_picture(root, root / folder / name))]
        if bad:
            more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
            yield f"{shown(folder)} lacks pictures: {bad[0]}{more}"


def _why_no_picture(root: Path, file: Path) -> str:
    """Empty for a PNG below `root`."""
    try:
        if not file.resolve().is_relative_to(root.resolve()):
            return "leads out of the report's folder"
        if not file.is_file():
            return "is missing"
        with Image.open(file, formats=["PNG"]):
            return ""
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        return f"cannot be read ({type(error).__name__})"


def _differences(first: Report, other: Report) -> Iterator[Problem]:
    """Why the candidates of two reports cannot be paired."""
    mend = "evaluate both with the same original and the same options"
    one, two = first.content, other.content
    for key in StoredSampling.model_fields:
        found = _first_difference(f"sampling.{key}", getattr(one.sampling, key), getattr(two.sampling, key))
        if found:
            where, wanted, got = found
            yield Problem(f"{where} differs from that of {printable(first.name)}", str(other.folder), shown(got),
                          shown(wanted), mend)  # fmt: skip
    wanted, got = one.original.pictures_sha256, two.original.pictures_sha256
    if wanted != got:
        what = f"its original draws other pictures than that of {printable(first.name)} (original.pictures_sha256)"
        yield Problem(what, str(other.folder), got[:16], wanted[:16], mend)


def _first_difference(where: str, one: Any, two: Any) -> tuple[str, object, object] | None:
    """The key of the innermost value that differs, and both values."""
    if one == two:
        return None
    if isinstance(one, list) and isinstance(two, list):
        if len(one) != len(two):
            return f"the number of {where}", len(one), len(two)
        return next(found for i in range(len(one)) if (found := _first_difference(f"{where}[{i}]", one[i], two[i])))
    if isinstance(one, dict) and isinstance(two, dict):
        keys = sorted({*one, *two})
        inner = (_first_difference(f"{where}.{printable(key)[:80]}", one.get(key), two.get(key)) for key in keys)
        return next((found for found in inner if found), None)
    return where, one, two
