"""Is the quantized model still good? Draws original and candidates alike, scores them, and says so with a floor."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bitroute.convert.checkpoint import open_pipeline
from bitroute.convert.reading import read_json
from bitroute.errors import JobError, Problem
from bitroute.eval.gate import Limit
from bitroute.eval.generate import draw_apart
from bitroute.eval.recording import record_apart
from bitroute.eval.replay import Replay, replay_apart
from bitroute.eval.sampling import Sample, Sampling, library_versions
from bitroute.eval.scores import Scores, read_pictures, score, unrelated_lpips
from bitroute.eval.tripwires import bad_pictures, unquantized, unrelated

FLOOR_DB = 1.0  # a candidate within 1 dB of the noise floor is indistinguishable from the original
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """One pipeline's pictures and what drawing them cost."""

    folder: Path
    pictures: Sequence[Tensor]
    measured: Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    name: str
    model: Path
    run: Run | None
    scores: Scores | None
    tripwires: Sequence[str]
    limits: Sequence[Limit]
    closeness: str = ""  # identical, indistinguishable, or empty
    replay: Replay | None = None  # errors of the denoiser per step and layer, on the original's inputs

    @property
    def passed(self) -> bool:
        """No tripwire, and every limit of the gate holds."""
        scores = self.scores
        return not self.tripwires and scores is not None and all(x.holds(scores.mean(x.metric)) for x in self.limits)


@dataclass(frozen=True)
class Evaluation:
    original: Path
    sampling: Sampling
    samples: Sequence[Sample]
    drawn: Run
    floor: Mapping[str, Scores]  # what changed → the original against itself
    candidates: Sequence[Candidate]
    environment: Mapping[str, Any] = field(default_factory=dict)
    share_text: bool = True
    unrelated_lpips: float | None = None  # of the original's pictures of different prompts
    recorded: Path | None = None  # what the original's denoiser was given and answered

    @property
    def passed(self) -> bool:
        return all(candidate.passed for candidate in self.candidates)


def evaluate(
    original: str, quantized: Sequence[str], sampling: Sampling, *, limits: Sequence[Limit] = (),
    share_text: bool = True, denoiser: bool = True, cache: Path | None = None, progress: Progress | None = None,
) -> Evaluation:  # fmt: skip
    """Compares quantized pipelines with their original on the same prompts, seeds and settings.

    share_text: every candidate uses the original's text encoders, so that only the other components differ.
    denoiser: also feed the original's inputs to every candidate's denoiser: its error per step, and per layer.
    cache: where pictures are kept, keyed by everything that decides them; by default the user's cache folder.

    Raises:
        SourceError: no such pipeline. JobError: the original cannot be drawn or scored.
    """
    report = progress or (lambda what: None)
    store = cache or default_cache()
    source = _folder(original)
    folders = _names(_folder(model) for model in quantized)
    samples = list(sampling.samples())
    report("original")
    drawn = _draw(source, sampling, samples, store / sampling.key(source))
    if broken := list(bad_pictures(samples, drawn.pictures, drawn.folder)):
        raise JobError(Problem("the original itself draws broken pictures", original, got="; ".join(broken)))
    floor = _floor(source, sampling, samples, drawn, store, report)
    far = unrelated_lpips(samples, drawn.pictures)
    recorded = _record(source, sampling, store, report) if denoiser else None
    environment = _environment(sampling)
    found = Evaluation(source, sampling, samples, drawn, floor, [], environment, share_text, far, recorded)
    candidates = []
    for name, folder in folders.items():
        report(name)
        candidates.append(_judge(name, folder, found, store, limits))
    return replace(found, candidates=candidates)


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitroute" / "eval"


def _folder(model: str) -> Path:
    """Absolute, so that it has a name; links keep theirs."""
    return Path(os.path.abspath(open_pipeline(model).folder))


def _names(folders: Iterable[Path]) -> dict[str, Path]:
    """Each folder by its name; parents' names are added where two are called alike. A folder twice counts once."""
    named = {}
    paths = list(dict.fromkeys(folders))
    for path in paths:
        tails = (path.parts[-length:] for length in range(1, len(path.parts) + 1))
        unique = next(tail for tail in tails if sum(other.parts[-len(tail) :] == tail for other in paths) == 1)
        named["/".join(unique)] = path
    return named


def _draw(
    model: Path, sampling: Sampling, samples: Sequence[Sample], folder: Path, text_from: Path | None = None
) -> Run:
    measured = draw_apart(model, sampling, folder, text_from)
    return Run(folder, read_pictures(folder, samples), measured)


def _floor(
    source: Path, sampling: Sampling, samples: Sequence[Sample], drawn: Run, store: Path, report: Progress
) -> dict[str, Scores]:
    """The original against itself: drawn again, and with the plain attention kernel."""
    report("noise floor: the original again")
    again = _draw(source, sampling, samples, store / f"{sampling.key(source)}-again")
    report("noise floor: another attention kernel")
    other = replace(sampling, attention="math")
    kernel = _draw(source, other, samples, store / other.key(source))
    return {
        "drawn again": score(samples, drawn.pictures, again.pictures),
        "another attention kernel": score(samples, drawn.pictures, kernel.pictures),
    }


def _record(source: Path, sampling: Sampling, store: Path, report: Progress) -> Path:
    report("the original's denoiser")
    folder = store / f"{sampling.key(source)}-recorded"
    record_apart(source, sampling, folder)
    return folder


def _judge(name: str, model: Path, found: Evaluation, store: Path, limits: Sequence[Limit]) -> Candidate:
    text_from = found.original if found.share_text else None
    tripwires = list(unquantized(found.original, model, found.share_text))
    run = scores = replay = None
    try:
        folder = store / found.sampling.key(model, *([text_from] if text_from else []))
        run = _draw(model, found.sampling, found.samples, folder, text_from)
        bad = list(bad_pictures(found.samples, run.pictures, run.folder))
        tripwires += bad
        scores = score(found.samples, found.drawn.pictures, run.pictures)
        tripwires += [] if bad else unrelated(scores.mean("lpips"), found.unrelated_lpips)
        if found.recorded and not bad:
            replay = replay_apart(model, found.original, found.recorded, found.sampling)
    except JobError as error:
        tripwires.append(_reason(error, name, model, store))
    return Candidate(name, model, run, scores, tripwires, limits, closeness(scores, found.floor), replay)


def _reason(error: JobError, name: str, model: Path, store: Path) -> str:
    """On one line, and without this machine's paths: the report may be published."""
    problem = error.problems[0]
    words = " ".join(f"{problem.what}: {problem.got}".split()) if problem.got else problem.what
    for path, instead in ((model, name), (store, "cache"), (Path.home(), "~")):
        words = words.replace(str(path), instead)
    return words


def closeness(scores: Scores | None, floor: Mapping[str, Scores]) -> str:
    """Both the mean of the dB and the dB of the mean error must lie within the floor, or one bad sample could hide."""
    if scores is None:
        return ""
    if scores.identical:
        return "identical"
    lowest = min(found.mean("psnr") for found in floor.values())
    lowest_of_mse = min(found.db_of_mse for found in floor.values())
    close = scores.mean("psnr") >= lowest - FLOOR_DB and scores.db_of_mse >= lowest_of_mse - FLOOR_DB
    return "indistinguishable" if close else ""


def _environment(sampling: Sampling) -> dict[str, Any]:
    return {
        "device": sampling.hardware,
        "threads": sampling.threads,
        "python": platform.python_version(),
        "libraries": library_versions(),
    }


def provenance_of(model: Path) -> dict[str, Any] | None:
    """What a checkpoint of bitroute says of itself, or None for others."""
    return read_json(model / "bitroute.json") if (model / "bitroute.json").is_file() else None
